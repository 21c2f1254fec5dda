"""Lower the dialect of a Program to ATen and the operators of native_kernels.py, for Inductor.

The kernel of a site depends on its formats alone; the operators look at M when they run. The report gives the kernel's
speed at the M of the example, also where M is symbolic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from qcompile.codegen import aten_fallback
from qcompile.codegen.cpu import traced_kernels as kernels
from qcompile.codegen.cpu.cpu_kernel_choice import choose_cpu_kernel
from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.codegen.prepared_weights import prepared_weights, stored_weight
from qcompile.codegen.rows import rows_label, rows_of
from qcompile.ir.op_calls import Operand, QLinearCall, site_name
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember


def lower_to_cpu(program: Program, remember: Remember) -> dict[str, dict[str, str]]:
    """Rewrite every call of the dialect, in place.

    Args:
        program: after fuse.
        remember: see weight_cache.py: prepared tensors are made once, whatever the number of graphs.

    Returns:
        site name -> label of M (rows.py) -> kernel, for the report.
    """
    chosen: dict[str, dict[str, str]] = {}
    for node, call in QLinearCall.find(program):
        choice = _lower_qlinear(program, node, call, remember)
        chosen.setdefault(site_name(program, node), {})[rows_label(node)] = str(choice)
    aten_fallback.lower_rest(program)
    program.cleanup()
    return chosen


def _lower_qlinear(program: Program, node: fx.Node, call: QLinearCall, remember: Remember) -> KernelChoice:
    n = int(call.weight.meta["val"].shape[0])
    choice = choose_cpu_kernel(call.weight_format, call.act, call.dtype, rows_of(node)[0], call.columns, n)
    insert = _INSERT.get(choice.kernel)
    if insert is None:
        result = aten_fallback.inline_qlinear(program, node, call)
    else:
        result = insert(program, node, call, remember)
    node.replace_all_uses_with(result)
    return choice


# -- one function for each kernel: which prepared tensors it reads, and what it inlines ------------------


def _int8_mm(program: Program, node: fx.Node, call: QLinearCall, remember: Remember) -> fx.Node:
    def run(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.int8_mm(x, x_scale, weight, scale, bias, call.dtype)

    result: fx.Node = program.inline(run, (call.x, call.x_scale, call.weight, call.scale, call.bias), before=node)
    return result


def _int8_float(program: Program, node: fx.Node, call: QLinearCall, remember: Remember) -> fx.Node:
    def run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.finish(kernels.int8_float(x, weight), scale, bias, call.dtype)

    result: fx.Node = program.inline(run, (call.x, call.weight, call.scale, call.bias), before=node)
    return result


def _dual_mm(program: Program, node: fx.Node, call: QLinearCall, remember: Remember) -> fx.Node:
    codes, _, _, group_scale = stored_weight(program, call)
    form, k = call.weight_format, call.columns

    def run(
        x: Tensor, x_scale: Tensor, nibbles: Tensor, group_scale: Tensor, zero: Tensor, scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return kernels.dual_mm(x, x_scale, nibbles, group_scale, zero, scale, bias, call.dtype)

    def with_zero() -> tuple[Tensor]:
        return (kernels.prepare_nibbles(codes, form, k),)

    def without_zero() -> tuple[Tensor, Tensor, Tensor]:
        assert group_scale is not None
        return kernels.prepare_symmetric(codes, group_scale, form, k)

    scale_of_groups: Operand
    zero: Operand
    if call.zero is None:
        nibbles, scale_of_groups, zero = prepared_weights(program, call, "symmetric nibbles", remember, without_zero)
    else:
        (nibbles,) = prepared_weights(program, call, "nibbles", remember, with_zero)
        scale_of_groups, zero = call.group_scale, call.zero
    operands = (call.x, call.x_scale, nibbles, scale_of_groups, zero, call.scale, call.bias)
    result: fx.Node = program.inline(run, operands, before=node)
    return result


def _nibble_float(program: Program, node: fx.Node, call: QLinearCall, remember: Remember) -> fx.Node:
    codes, scale, zero, group_scale = stored_weight(program, call)
    form, k = call.weight_format, call.columns

    def make() -> tuple[Tensor, Tensor, Tensor]:
        scale_of_groups = group_scale if form.dual else scale
        assert scale_of_groups is not None
        slope, offset = kernels.group_offsets(scale_of_groups, zero)
        return kernels.prepare_nibbles(codes, form, k), slope, offset

    def run(x: Tensor, nibbles: Tensor, a: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        sums = kernels.nibble_float(x, nibbles, a, c)
        return kernels.finish(sums, scale if form.dual else torch.ones(1), bias, call.dtype)

    nibbles, a, c = prepared_weights(program, call, "affine nibbles", remember, make)
    result: fx.Node = program.inline(run, (call.x, nibbles, a, c, call.scale, call.bias), before=node)
    return result


_INSERT: dict[str, Callable[[Program, fx.Node, QLinearCall, Remember], fx.Node]] = {
    "int8_mm": _int8_mm,
    "dual_mm": _dual_mm,
    "int8_float": _int8_float,
    "nibble_float": _nibble_float,
}
