"""Grouped matmuls of mixture-of-experts layers, split by expert.

A layer sorts rows by expert and multiplies all of them in one grouped matmul, whose last operand says where each
expert's rows end. ONNX has no such operator. In a file every expert takes its rows (Slice), multiplies them (MatMul; of
codes MatMulNBits, with standard operators only DequantizeLinear and MatMul), and the results are concatenated (Concat);
an expert that no token was routed to multiplies no rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from qcompile.analysis.sites import grouped_operands, is_grouped_matmul, through_transposes
from qcompile.codegen.onnx.ops.expert_ops import ExpertsBlockedCall, ExpertsLinearCall, ExpertsNBitsCall
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError
from qcompile.codegen.onnx.tracing.weight_layouts import block_size_of, to_dequantize_linear, to_matmul_nbits
from qcompile.ir.op_calls import DequantizeCall, Operand
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor


def split_grouped_matmuls(program: Program, contrib_ops: bool = True) -> int:
    """Let each expert multiply its own rows, in place.

    Args:
        program: of a model whose quantized stacks are read by qcompile::dequantize (modules/quant_experts.py).
        contrib_ops: whether the file may use operators of ONNX Runtime beside those of the ONNX standard.

    Returns:
        How many grouped matmuls were split.

    Raises:
        OnnxUnsupportedError: a stack that is no weight, or a quantized one that something else than a grouped matmul
            reads.
    """
    grouped = [(node, found) for node in program.graph.nodes if (found := grouped_operands(node)) is not None]
    for node, (x, stack, ends) in grouped:
        source, transposes = through_transposes(stack)
        is_transposed = transposes % 2 == 1
        if program.weight_name(source) is not None:
            new = _split_float(program, node, x, ends, program.weight_of(source), is_transposed)
        elif DequantizeCall.matches(source) and is_transposed:
            new = _split_quantized(program, node, x, ends, source, contrib_ops)
        else:
            raise OnnxUnsupportedError(
                f"{node.name}: experts with a stack that is no weight of the model ({source.name}). Fix: multiply the "
                "rows by the parameter itself, transposed or not"
            )
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    program.cleanup()
    _check_nothing_left(program)
    return len(grouped)


def _check_nothing_left(program: Program) -> None:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if others := [node.name for node in calls if is_grouped_matmul(node)]:
        raise OnnxUnsupportedError(
            f"{others[0]}: experts are multiplied as (rows [T, K], stack [E, K, N], ends [E]) only. Fix: give the ends"
        )
    if remaining := list(DequantizeCall.find(program)):
        raise OnnxUnsupportedError(
            f"{len(remaining)} quantized stacks of experts are read by {next(iter(remaining[0][0].users)).name} and "
            "others: only products of rows sorted by expert have an ONNX form. Fix: let the model sort them, as "
            "transformers' model.set_experts_implementation('grouped_mm') does, or keep the experts in float by a rule"
        )


def _split_float(
    program: Program, node: fx.Node, x: fx.Node, ends: fx.Node, stack: Tensor, is_transposed: bool
) -> fx.Node:
    """stack: [E, K, N], or [E, N, K] where it is transposed before it is multiplied."""
    weights = [(weight.t() if is_transposed else weight).contiguous() for weight in stack]
    call = ExpertsLinearCall(x, ends, _add_weights(program, node, "weight", weights))
    return call.insert(program, before=node)


def _split_quantized(
    program: Program, node: fx.Node, x: fx.Node, ends: fx.Node, stack: fx.Node, contrib_ops: bool
) -> fx.Node:
    """stack: the dequantized [E, N, K]."""
    read = DequantizeCall.of(stack)
    form, k = Format.parse(read.format), read.columns or stack.meta["val"].shape[-1]
    to_layout = to_matmul_nbits if contrib_ops else to_dequantize_linear
    layouts = [to_layout(_expert(program, read, e, form, k)) for e in range(stack.meta["val"].shape[0])]
    codes, scales, zeros = (
        [] if tensors[0] is None else _add_weights(program, node, part, tensors)
        for part, tensors in zip(("codes", "scales", "zeros"), zip(*layouts, strict=True), strict=True)
    )
    target = ExpertsNBitsCall if contrib_ops else ExpertsBlockedCall
    call = target(x, ends, codes, scales, zeros, k, form.bits, block_size_of(form, k))
    return call.insert(program, before=node)


def _expert(program: Program, read: DequantizeCall, expert: int, form: Format, k: int) -> QTensor:
    """The weight [N, K] of one expert of a stack."""

    def part(operand: Operand) -> Tensor | None:
        return None if operand is None else program.weight_of(operand)[expert]

    codes, scale = program.weight_of(read.codes)[expert], program.weight_of(read.scale)[expert]
    return QTensor.from_stored((codes, scale, part(read.zero), part(read.group_scale)), form, k)


def _add_weights(program: Program, node: fx.Node, part: str, tensors: Sequence[Tensor]) -> list[fx.Node]:
    return [program.add_weight(f"{node.name}.{part}.{e}", tensor) for e, tensor in enumerate(tensors)]
