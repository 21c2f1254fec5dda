"""Linear layers of a Program as products of a GPU: those that share an input are one.

q, k and v of an attention, gate and up of an MLP: a decoded token then launches four products for a layer instead of
seven, and none of them is too small for the GPU. Each site reads its channels of the one result, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from qcompile.codegen import aten_fallback
from qcompile.codegen.prepared_weights import prepared_weights, stored_weight, tensor_names
from qcompile.codegen.rows import rows_of
from qcompile.codegen.sibling_products import Siblings, find_siblings, merged_parts
from qcompile.codegen.triton.gpu_kernel_choice import choose_gpu_kernel, without_kernel
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.kernel_support import operator_for
from qcompile.codegen.triton.launch.group_gemm import prepare_group
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.codegen.triton.launch.w4a8 import prepare_w4a8
from qcompile.codegen.triton.triton_op_calls import (
    CenteredCall,
    LinearA8Call,
    LinearGroupCall,
    LinearW4A8Call,
    LinearWCall,
)
from qcompile.ir.aten_ops import aten
from qcompile.ir.op_calls import Operand
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember
from qcompile.numerics.qtensor import StoredParts, dequantize_to_int8, unpack_codes


def merged_siblings(program: Program) -> Iterator[Siblings]:
    """All calls of qlinear, those together that become one product; in graph order of the first.

    A call whose only reader adds something to its result stays alone: a kernel's epilogue adds it.
    """
    for siblings in find_siblings(program):
        members = list(zip(siblings.nodes, siblings.calls, strict=True))
        together = [(node, call) for node, call in members if not _is_added_to(node)]
        if together:
            yield Siblings(*zip(*together, strict=True))
        for node, call in members:
            if _is_added_to(node):
                yield Siblings((node,), (call,))


def _is_added_to(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and users[0].target is aten.add.Tensor


class LinearLayers:
    """One product: which kernel computes it, and what that reads."""

    def __init__(self, program: Program, siblings: Siblings, remember: Remember, gpu: Gpu) -> None:
        self.program, self.siblings, self.remember, self.gpu = program, siblings, remember, gpu
        self.call, self.before = siblings.first, siblings.nodes[0]
        self.form, self.k = self.call.weight_format, self.call.columns

    def lower(self) -> str:
        """Replace the calls; returns the kernel, and its measured speed in comparison with float."""
        call, form, n = self.call, self.form, sum(self.siblings.channels)
        operator = operator_for(form, call.act, call.dtype, self.gpu.capability)
        in_program = all(
            self.program.weight_name(part) is not None
            for each in self.siblings.calls for part in each.stored if part is not None
        )  # fmt: skip
        insert = {"linear_w": self._linear_w, "linear_w4a8": self._linear_w4a8, "linear_a8": self._linear_a8,
                  "linear_group": self._linear_group}  # fmt: skip
        choice = choose_gpu_kernel(self.gpu, form, call.act, call.dtype, rows_of(self.before)[0], self.k, n)
        if operator is None or not in_program:
            for node, each in zip(self.siblings.nodes, self.siblings.calls, strict=True):
                node.replace_all_uses_with(aten_fallback.inline_qlinear(self.program, node, each))
                self.program.graph.erase_node(node)
            return str(choice if operator is None else without_kernel("the weight is computed in the graph"))
        self.siblings.replace(self.program, insert[operator]())
        for node in self.siblings.nodes:
            self.program.graph.erase_node(node)
        count = len(self.siblings.nodes)
        return f"{choice}{f', {count} sites in one product' if count > 1 else ''}"

    def _linear_w(self) -> fx.Node:
        kind, dtype = f"linear_w {NAMES[self.call.dtype]}", self.call.dtype
        packed, scale, *zeros = self._prepare(kind, lambda parts: prepare(*parts, self.form, self.k, dtype))
        return LinearWCall(
            self.call.x, packed, scale, zeros[0] if zeros else None, self._bias(), residual=None, low=None, up=None,
            format=self.call.format, columns=self.k,
        ).insert(self.program, before=self.before)  # fmt: skip

    def _linear_w4a8(self) -> fx.Node:
        parts = self._prepare("linear_w4a8", lambda parts: prepare_w4a8(*parts, self.form, self.k))
        packed, steps, scale = parts
        x_scale = self.call.x_scale
        assert x_scale is not None
        return LinearW4A8Call(
            self.call.x, x_scale, packed, steps, scale, self._bias(), residual=None, low=None, up=None,
            format=self.call.format, columns=self.k, dtype=self.call.dtype,
        ).insert(self.program, before=self.before)  # fmt: skip

    def _linear_group(self) -> fx.Node:
        act = self.call.act_format
        assert act is not None and self.call.x_scale is not None
        packed, words = self._prepare(
            f"linear_group {act.group}", lambda parts: prepare_group(*parts, self.form, act, self.k)
        )
        x = self.call.x
        if self.call.x_zero is not None and act.zero != "none":
            x = CenteredCall(x, self.call.x_zero, str(act)).insert(self.program, before=self.before)
        return LinearGroupCall(
            x, self.call.x_scale, packed, words, self._bias(), residual=None, low=None, up=None,
            format=self.call.format, act=str(act), columns=self.k, dtype=self.call.dtype,
        ).insert(self.program, before=self.before)  # fmt: skip

    def _linear_a8(self) -> fx.Node:
        weight, scale, x_scale = self.call.weight, self.call.scale, self.call.x_scale
        assert x_scale is not None
        if len(self.siblings.nodes) > 1 or self.form.dual:
            (weight,) = self._prepare("int8" if self.form.dual else "codes", self._codes)
        if len(self.siblings.nodes) > 1 or self.form.scale != "f32":
            (scale,) = self._prepare("float32 scales", lambda parts: (parts[1].float(),))
        return LinearA8Call(
            self.call.x, x_scale, weight, scale, self._bias(), residual=None, low=None, up=None, dtype=self.call.dtype
        ).insert(self.program, before=self.before)

    def _codes(self, parts: StoredParts) -> tuple[Tensor]:
        codes, _, zero, group_scale = parts
        if not self.form.dual:
            return (codes,)
        return (dequantize_to_int8(unpack_codes(codes, self.form, self.k), zero, group_scale, self.form),)

    def _prepare(self, layout: str, make: Callable[[StoredParts], tuple[Tensor | None, ...]]) -> list[fx.Node]:
        """What the kernel reads of the weights, one below the other."""
        stored = [stored_weight(self.program, call) for call in self.siblings.calls]
        return prepared_weights(
            self.program, self.siblings.calls, layout, self.remember, lambda: make(merged_parts(stored))
        )

    def _bias(self) -> Operand:
        """The biases [N], one behind the other."""
        biases = [call.bias for call in self.siblings.calls if call.bias is not None]
        if len(biases) < 2:
            return biases[0] if biases else None
        values = [self.program.weight_of(bias) for bias in biases]
        (made,) = self.remember("joined bias", values, lambda: (torch.cat(values),))
        name = f"{tensor_names(self.program, biases)}.joined bias"  # of its own: one weight may have several biases
        return self.program.node_of(name) if name in self.program.weights else self.program.add_weight(name, made)
