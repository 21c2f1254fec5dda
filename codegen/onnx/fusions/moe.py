"""Layers of experts: each expert multiplies its own rows.

A layer sorts rows by expert and multiplies all of them in one grouped product, whose last operand says where each
expert's rows end. ONNX has no such product. In a file every expert takes its rows (Slice), multiplies them (MatMul; by
its codes MatMulNBits, in a portable file DequantizeLinear and MatMul), and the results lie one behind another again
(Concat); one that no token was sent to multiplies no rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

import qcompile.codegen.onnx.ops.matmul_ops  # noqa: F401  registers torch.ops.qcompile_onnx
from qcompile.analysis.sites import grouped_operands, through_transposes
from qcompile.codegen.onnx.tracing.onnx_linear import NoOnnxForm, block_of, to_blocks, to_columns
from qcompile.ir.program import Program
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format

ops = torch.ops.qcompile_onnx
_READ = torch.ops.qcompile.dequantize.default  # how a quantized stack is read (qcompile/modules/quant_experts.py)


def split_experts(program: Program, portable: bool = False) -> int:
    """Let each expert multiply its own rows, in place; returns how many products were split.

    Raises:
        NoOnnxForm: a stack that is no weight, or a quantized one that something else than such a product reads.
    """
    products = [(node, found) for node in program.graph.nodes if (found := grouped_operands(node)) is not None]
    for node, (x, stack, ends) in products:
        source, turns = through_transposes(stack)
        if program.weight_name(source) is not None:
            new = _floats(program, node, x, ends, source, turned=turns % 2 == 1)
        elif source.target is _READ and turns % 2 == 1:
            new = _codes(program, node, x, ends, source, portable=portable)
        else:
            raise NoOnnxForm(f"{node.name}: experts with a stack that is no weight of the model ({source.name})")
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    program.cleanup()
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if strange := [node.name for node in calls if "grouped_mm" in str(node.target)]:
        raise NoOnnxForm(f"{strange[0]}: experts are multiplied as (rows [T, K], stack [E, K, N], ends [E]) only")
    if left := program.graph.find_nodes(op="call_function", target=_READ):
        raise NoOnnxForm(
            f"{len(left)} quantized stacks of experts are read by {next(iter(left[0].users)).name} and others: "
            "only products of rows sorted by expert have an ONNX form. Let the model sort them, as transformers' "
            "model.set_experts_implementation('grouped_mm') does, or keep the experts in float by a rule"
        )
    return len(products)


def _floats(program: Program, node: fx.Node, x: fx.Node, ends: fx.Node, stack: fx.Node, *, turned: bool) -> fx.Node:
    """turned: the stack is [E, N, K], not [E, K, N]."""
    weights = program.weights[program.weight_name(stack) or ""]
    each = [(weight.t() if turned else weight).contiguous() for weight in weights]
    return program.insert(ops.experts_linear.default, (x, ends, _add(program, node, "weight", each)), before=node)


def _codes(program: Program, node: fx.Node, x: fx.Node, ends: fx.Node, read: fx.Node, *, portable: bool) -> fx.Node:
    names = [program.weight_name(operand) for operand in read.args[:4]]
    parts = dict(
        zip(
            ("codes", "scale", "zero", "group_scale"),
            [None if name is None else program.weights[name] for name in names],
            strict=True,
        )
    )
    form, k = Format.parse(read.args[4]), read.args[5] or read.meta["val"].shape[-1]
    experts, n, _ = read.meta["val"].shape
    laid_out, found = to_columns if portable else to_blocks, []
    for e in range(experts):
        of_expert = {name: None if part is None else part[e] for name, part in parts.items()}
        found.append(laid_out(QuantLinear(k, n, form, None, of_expert | dict(bias=None, signs=None))))
    codes, scales, zeros = (
        [] if each[0] is None else _add(program, node, part, each)
        for part, each in zip(("codes", "scales", "zeros"), zip(*found, strict=True), strict=True)
    )
    sizes = (k, form.bits, block_of(form, k))
    product = ops.experts_blocked.default if portable else ops.experts_nbits.default
    return program.insert(product, (x, ends, codes, scales, zeros, *sizes), before=node)


def _add(program: Program, node: fx.Node, part: str, tensors: Sequence[Tensor]) -> list[fx.Node]:
    return [program.add_weight(f"{node.name}.{part}.{e}", tensor) for e, tensor in enumerate(tensors)]
