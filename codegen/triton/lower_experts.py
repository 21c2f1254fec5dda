"""Products of routed rows with quantized stacks of experts, lowered to experts_w, experts_a8 and experts_w4a8.

    qexperts(x, .., ends, codes, ..)                                what the pass Fuse made
    grouped product of x, dequantize(codes, ..)^T and ends          a model whose stacks were quantized in place

A gather of rows before it, x = y[rows], is done inside the product: no sorted copy of y is made. Where x is quantized,
y is quantized in its place: a row of y once, not once for each of its experts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx

from qcompile.analysis.sites import grouped_operands, through_transposes
from qcompile.codegen.rows import rows_label
from qcompile.codegen.triton.gpu_kernel_choice import choose_experts_kernel, without_kernel
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.launch.experts import prepare_experts
from qcompile.codegen.triton.launch.quantized_experts import prepare_experts_a8, prepare_experts_w4a8
from qcompile.codegen.triton.triton_op_calls import ExpertsA8Call, ExpertsW4A8Call, ExpertsWCall
from qcompile.ir.node_meta import SITE, WRITTEN
from qcompile.ir.op_calls import DequantizeCall, Operand, QExpertsCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import StoredParts

_INDEX = torch.ops.aten.index.Tensor


@dataclass(frozen=True)
class _Product:
    """A product of rows [S, K] and a stack of experts.

    Attributes:
        x: the rows, float or codes.
        x_scale: of the codes.
        act: their format, "" where x is float.
        ends: of the rows of each expert.
        stored: codes, scale, zero point and group scale of the stack.
        format: of the stack.
        columns: K.
        dtype: of float rows, or of what codes stand for.
    """

    x: fx.Node
    x_scale: Operand
    act: str
    ends: fx.Node
    stored: tuple[fx.Node, fx.Node, Operand, Operand]
    format: str
    columns: int
    dtype: torch.dtype

    def site(self, program: Program, node: fx.Node) -> str:
        """The name of the stack: what the pass that quantized it noted, or where its codes are."""
        noted: str | None = node.meta.get(SITE)
        return noted or str(program.weight_name(self.stored[0])).removesuffix(".codes")


def lower_experts(program: Program, remember: Remember, gpu: Gpu) -> dict[str, dict[str, str]]:
    """Rewrite every product with a quantized stack, in place; one that no kernel computes stays as it is.

    Args:
        program: with calls of the dialect.
        remember: see weight_cache.py.
        gpu: the GPU.

    Returns:
        site name -> label of M -> kernel, or why there is none, for the report.
    """
    chosen: dict[str, dict[str, str]] = {}
    for node in list(program.graph.nodes):
        product = _product_of(node)
        if product is None:
            continue
        form, dtype = Format.parse(product.format), product.dtype
        choice = choose_experts_kernel(gpu, form, product.act, dtype, product.columns)
        if any(part is not None and program.weight_name(part) is None for part in product.stored):
            choice = without_kernel("the weight is computed in the graph")
        if node.meta["val"].dtype != dtype:
            choice = without_kernel(f"a result in {node.meta['val'].dtype} of x in {dtype}")
        if choice.has_kernel:
            program.replace(node, _lowered(program, node, product, remember))
        chosen.setdefault(product.site(program, node), {})[rows_label(node)] = str(choice)
    return chosen


def _product_of(node: fx.Node) -> _Product | None:
    if QExpertsCall.matches(node):
        call = QExpertsCall.of(node)
        dtype = call.dtype if call.act else call.x.meta["val"].dtype
        return _Product(call.x, call.x_scale, call.act, call.ends, call.stored, call.format, call.columns, dtype)
    found = grouped_operands(node) if node.op == "call_function" else None
    if found is None:
        return None
    x, weight, ends = found
    stack, transposes = through_transposes(weight)
    if transposes % 2 == 0 or not DequantizeCall.matches(stack):
        return None
    codes = DequantizeCall.of(stack)
    stored = codes.codes, codes.scale, codes.zero, codes.group_scale
    return _Product(x, None, "", ends, stored, codes.format, codes.columns, x.meta["val"].dtype)


def _lowered(program: Program, node: fx.Node, product: _Product, remember: Remember) -> fx.Node:
    """The call of the operator, before the node."""
    form, k, dtype = Format.parse(product.format), product.columns, product.dtype
    if not product.act:
        made = _prepared(program, product, remember, f"experts_w {str(dtype).removeprefix('torch.')}",
                         lambda parts: prepare_experts(*parts, form, k, dtype))  # fmt: skip
        packed, scales, *zeros = made
        x, rows = _gathered(product.x)
        return ExpertsWCall(
            x, rows, product.ends, packed, scales, zeros[0] if zeros else None, product.format, k
        ).insert(program, before=node)  # fmt: skip
    codes, scale, rows = _gathered_codes(program, product)
    if byte_layout_of(form) is not None:
        packed, steps, scales = _prepared(program, product, remember, "experts_w4a8",
                                          lambda parts: prepare_experts_w4a8(*parts, form, k))  # fmt: skip
        return ExpertsW4A8Call(
            codes, scale, rows, product.ends, packed, steps, scales, product.format, k, dtype
        ).insert(program, before=node)  # fmt: skip
    stack = list(product.stored[:2])  # as it is stored
    if form.dual or form.scale != "f32":
        stack = _prepared(program, product, remember, "experts_a8", lambda parts: prepare_experts_a8(*parts, form, k))
    return ExpertsA8Call(codes, scale, rows, product.ends, stack[0], stack[1], dtype).insert(program, before=node)


def _prepared(
    program: Program, product: _Product, remember: Remember, kind: str,
    make: Callable[[StoredParts], tuple[Tensor | None, ...]],
) -> list[fx.Node]:  # fmt: skip
    """What a kernel reads of the stack, as weights of the program."""
    codes, scale, zero, group_scale = (None if part is None else program.weight_of(part) for part in product.stored)
    assert codes is not None and scale is not None
    sources, nodes = [part for part in (codes, scale, zero, group_scale) if part is not None], []
    made = remember(
        kind, sources, lambda: tuple(part for part in make((codes, scale, zero, group_scale)) if part is not None)
    )
    for index, tensor in enumerate(made):
        name = f"{program.weight_name(product.stored[0])}.{kind}.{index}"
        nodes.append(program.node_of(name) if name in program.weights else program.add_weight(name, tensor))
    return nodes


def _gathered_codes(program: Program, product: _Product) -> tuple[fx.Node, fx.Node, Operand]:
    """Codes of quantize(y[rows]), their scales and None -> those of quantize(y), and rows; else as they are."""
    codes, scale = product.x, product.x_scale
    assert scale is not None
    pair = codes.args[0] if codes.target is operator.getitem else None
    if not isinstance(pair, fx.Node) or not QuantizeCall.matches(pair) or scale.args != (pair, 1):
        return codes, scale, None
    y, rows = _gathered(QuantizeCall.of(pair).x)
    if rows is None:
        return codes, scale, None
    early = QuantizeCall(y, product.act).insert(program, after=y)
    of_y, scale_of_y, _ = program.unpack(early, 3)
    return of_y, scale_of_y, rows


def _gathered(x: fx.Node) -> tuple[fx.Node, Operand]:
    """x = y[rows] -> y and rows; else x and None."""
    if x.target is not _INDEX:
        return x, None
    y, indices = cast(tuple[fx.Node, list[fx.Node | None]], x.args)
    rows = indices[0]
    if len(indices) != 1 or rows is None or y.meta.get(WRITTEN) or rows.meta.get(WRITTEN):
        return x, None
    value, index = y.meta["val"], rows.meta["val"]
    return (y, rows) if value.ndim == 2 and index.ndim == 1 and not index.dtype == torch.bool else (x, None)
