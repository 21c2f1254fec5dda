"""Lower the dialect of a Program to ATen and the operators of native_kernels.py, for Inductor.

The kernel of a site depends on its formats alone; the operators take any number of rows. The report gives the kernel's
speed at the M of the example, also where M is symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.codegen import aten_fallback
from qcompile.codegen.cpu.attention_rows import lower_attentions
from qcompile.codegen.cpu.cpu_kernel_choice import choose_cpu_kernel
from qcompile.codegen.cpu.gelu_rows import fuse_gelu
from qcompile.codegen.cpu.linear_weights import (
    center,
    dual_group,
    dual_weight,
    group_of,
    grouped_weight,
    has_row_scale,
    int8_weight,
    table_of,
)
from qcompile.codegen.cpu.native_kernels import load_native_kernels, ops
from qcompile.codegen.cpu.short_attention import lower_short_attentions
from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.codegen.prepared_weights import prepared_weights, stored_weight, tensor_names
from qcompile.codegen.rows import rows_label, rows_of
from qcompile.codegen.sibling_products import Siblings, find_siblings, merged_parts, share_quantizations
from qcompile.ir.aten_ops import aten
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.op_calls import Operand, QuantizeCall, site_name
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember
from qcompile.numerics.qtensor import StoredParts


def lower_to_cpu(program: Program, remember: Remember) -> dict[str, dict[str, str]]:
    """Rewrite every call of the dialect, in place.

    Args:
        program: after fuse.
        remember: see weight_cache.py: prepared tensors are made once, whatever the number of graphs.

    Returns:
        site name -> label of M (rows.py) -> kernel, for the report.
    """
    load_native_kernels()
    share_quantizations(program)
    fuse_gelu(program)
    chosen: dict[str, dict[str, str]] = {}
    for siblings in find_siblings(program):
        names = [site_name(program, node) for node in siblings.nodes]
        choice = _Lowering(program, siblings, remember).run()
        merged = len(names) > 1 and choice.kernel != "dequant_mm"
        together = f", {len(names)} sites in one product" if merged else ""
        for name, node in zip(names, siblings.nodes, strict=True):
            chosen.setdefault(name, {})[rows_label(node)] = f"{choice}{together}"
    lower_attentions(program)
    lower_short_attentions(program)
    aten_fallback.lower_rest(program)
    program.cleanup()
    return chosen


class _Lowering:
    """One product: which prepared tensors its kernel reads, and the call of the operator."""

    def __init__(self, program: Program, siblings: Siblings, remember: Remember) -> None:
        self.program, self.siblings, self.remember = program, siblings, remember
        self.call, self.before = siblings.first, siblings.nodes[0]
        self.form, self.k, self.n = self.call.weight_format, self.call.columns, sum(siblings.channels)

    def run(self) -> KernelChoice:
        """Replace the product; returns its kernel."""
        call = self.call
        choice = choose_cpu_kernel(self.form, call.act, call.dtype, rows_of(self.before)[0], self.k, self.n)
        if call.dtype == torch.float64:  # exact as the dialect has it; kernels and ATen round to float32
            return choice
        insert = _INSERT.get(choice.kernel)
        if insert is None or any(self.program.weight_name(part) is None for part in call.stored if part is not None):
            for node, each in zip(self.siblings.nodes, self.siblings.calls, strict=True):
                node.replace_all_uses_with(aten_fallback.inline_qlinear(self.program, node, each))
            return KernelChoice("dequant_mm", has_kernel=False) if insert else choice
        self.siblings.replace(self.program, insert(self))
        return choice

    def int8_linear(self) -> fx.Node:
        codes, scale = self._prepare("bytes", int8_weight), self._scale()
        return self._insert(ops.int8_linear.default, *self._rows(), *codes, scale, self._bias())

    def int8_float_linear(self) -> fx.Node:
        codes, scale = self._prepare("bytes", int8_weight), self._scale()
        return self._insert(ops.int8_float_linear.default, self.call.x, *codes, scale, self._bias())

    def dual_linear(self) -> fx.Node:
        parts = self._prepare("two-level nibbles", lambda parts: dual_weight(parts, self.form, self.k))
        group = dual_group(self.form, self.k)
        return self._insert(ops.dual_linear.default, *self._rows(), *parts, self._scale(), self._bias(), group)

    def group_linear(self) -> fx.Node:
        codes, step, zero = self._grouped()
        middle = center(self.form) if zero is None else 0.0
        settings = middle, group_of(self.form, self.k)
        return self._insert(ops.group_linear.default, *self._rows(), codes, step, zero, None, self._bias(), *settings)

    def table_linear(self) -> fx.Node:
        codes, step, zero = self._grouped()
        name = f"table of {self.form.dtype}"
        known = name in self.program.weights
        table = self.program.node_of(name) if known else self.program.add_weight(name, table_of(self.form))
        scale, middle = self._scale() if has_row_scale(self.form) else None, 0.0 if zero is None else -center(self.form)
        settings = middle, group_of(self.form, self.k)
        return self._insert(
            ops.table_linear.default, self.call.x, codes, table, step, zero, scale, self._bias(), *settings
        )

    # -- operands ----------------------------------------------------------------------------------

    def _insert(self, target: Any, *arguments: Any) -> fx.Node:
        return self.program.insert(target, (*arguments, self.n, self.call.dtype), before=self.before)

    def _prepare(self, layout: str, make: Callable[[StoredParts], tuple[Tensor | None, ...]]) -> list[fx.Node]:
        """Packed tensors of all siblings' weights as one."""
        stored = [stored_weight(self.program, call) for call in self.siblings.calls]
        return prepared_weights(
            self.program, self.siblings.calls, layout, self.remember, lambda: make(merged_parts(stored))
        )

    def _grouped(self) -> tuple[fx.Node, fx.Node, Operand]:
        parts = self._prepare("nibbles", lambda parts: grouped_weight(parts, self.form, self.k))
        return parts[0], parts[1], parts[2] if len(parts) > 2 else None

    def _rows(self) -> tuple[fx.Node, Operand]:
        """x and its scale: floats and None where only this product reads the codes, and so quantizes them itself."""
        call = self.call
        quantize = call.x.args[0] if call.x.target is operator.getitem else None
        if isinstance(quantize, fx.Node) and QuantizeCall.matches(quantize):
            activation = QuantizeCall.of(quantize)
            readers = {user for part in quantize.users for user in part.users}
            is_fixed = not activation.x.meta.get(WRITTEN)  # the same value where the product reads it
            if is_fixed and activation.format == "int8/row" and readers == set(self.siblings.nodes):
                return activation.x, None
        return call.x, call.x_scale

    def _scale(self) -> fx.Node:
        """float32, one for each channel."""
        return self._joined([call.scale for call in self.siblings.calls], "scale")

    def _bias(self) -> Operand:
        """float32 [N]."""
        biases = [call.bias for call in self.siblings.calls if call.bias is not None]
        return self._joined(biases, "bias") if biases else None

    def _joined(self, values: list[fx.Node], what: str) -> fx.Node:
        """Values of channels of all siblings in float32, made once where they are weights."""
        first, program = values[0], self.program
        name = program.weight_name(first)
        if len(values) == 1 and first.meta["val"].dtype == torch.float32:
            return first
        if name is None:
            return program.insert(aten._to_copy.default, (first,), {"dtype": torch.float32}, before=self.before)
        sources = [program.weight_of(value) for value in values]
        (made,) = self.remember(f"joined {what}", sources, lambda: (torch.cat([s.float() for s in sources]),))
        joined = f"{tensor_names(program, values)}.joined {what}"  # of its own: one weight may have several biases
        return program.node_of(joined) if joined in program.weights else program.add_weight(joined, made)


_INSERT: dict[str, Callable[[_Lowering], fx.Node]] = {
    "int8_linear": _Lowering.int8_linear,
    "dual_linear": _Lowering.dual_linear,
    "group_linear": _Lowering.group_linear,
    "table_linear": _Lowering.table_linear,
    "int8_float_linear": _Lowering.int8_float_linear,
}
