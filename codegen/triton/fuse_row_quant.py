"""Lower every quantize of activations to row_quant, together with what stands before it.

    [residual sum] -> [norm | silu(a) b] -> [/ or * a vector of channels] -> [Hadamard] -> quantize

Walking back from the quantize, each is fused if row_quant computes it too. A sum, a norm or a gate whose value has
other consumers (a site that is kept float, a router, the residual stream) is fused all the same: the kernel writes the
value beside the codes, and the other consumers read that.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from qcompile.analysis.norms import Norm, find_norms, through_casts
from qcompile.codegen.aten_fallback import replace_quantize
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.kernel_support import has_format, row_quant_codes
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.row_quant import MAX_K, TENSORS, fuses_hadamard, transform_matrices
from qcompile.codegen.triton.triton_op_calls import (
    CenteredCall,
    LinearA8Call,
    LinearGroupCall,
    LinearW4A8Call,
    LinearWCall,
    RowQuantCall,
)
from qcompile.ir.aten_ops import LINEAR, VIEWS
from qcompile.ir.op_calls import HadamardCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.numerics.format import Format

aten = torch.ops.aten

_PRODUCTS = frozenset({LinearWCall.target, LinearA8Call.target, LinearW4A8Call.target, LinearGroupCall.target})
_KERNELS = _PRODUCTS | {RowQuantCall.target}
# Their results lie in memory whatever Inductor does, and so does what a kernel of ours reads: a sum of two such values
# is a pass of its own. A sum with anything else (another norm, say) Inductor computes where that is, which reads less.
_IN_MEMORY = frozenset({
    operator.getitem, LINEAR, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.embedding.default,
}) | _PRODUCTS  # fmt: skip
_TOTAL, _VALUE = 2, 3  # results of row_quant: x + residual, and the value of norm or gate


@dataclass
class _Fused:
    """What is computed before rows are quantized.

    Attributes:
        x: where it starts.
        fields: of the spec.
        tensors: operands of the operator, by name.
        eps: of the norm.
        written: what the kernel writes for other consumers: index of the result -> the node that computes it now, and
            its other consumers.
    """

    x: fx.Node
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, fx.Node] = field(default_factory=dict)
    eps: float = 0.0
    written: dict[int, tuple[fx.Node, list[fx.Node]]] = field(default_factory=dict)


def fuse_into_row_quant(program: Program, capability: tuple[int, int]) -> None:
    """Rewrite every quantize that row_quant computes, in place.

    Args:
        program: after the linear layers were lowered.
        capability: of the GPU.
    """
    norms = {norm.output: norm for norm in find_norms(program)}
    moved: dict[fx.Node, fx.Node] = {}  # a value -> the result of a kernel that is read in its place
    kernels: dict[QuantizeCall, fx.Node] = {}
    for node, call in QuantizeCall.find(program):
        form, value = Format.parse(call.format), call.x.meta["val"]
        written = row_quant_codes(form)
        if written is None or not has_format(written, capability):
            continue
        centered = _centered(node)
        if form.zero != "none" and centered is None:
            continue
        if value.dtype not in NAMES or max(int(value.shape[-1]), form.group) > MAX_K:
            continue
        if call not in kernels:
            fused = _walk_back(program, call.x, norms, moved, capability, form.group)
            zero = form.zero != "none"
            spec = RowQuant(NAMES[value.dtype], **fused.fields, codes=written, group=form.group, zero=zero)
            if spec.hadamard:
                for side, matrix in zip(("left", "right"), transform_matrices(spec, value.device), strict=True):
                    fused.tensors[side] = _constant(program, f"hadamard.{spec.hadamard}.{side}", matrix, value.device)
            kernels[call] = _insert(program, node, fused, spec, moved)
        codes, scale = (program.insert(operator.getitem, (kernels[call], index), before=node) for index in (0, 1))
        for each in centered or ():
            each.replace_all_uses_with(codes)
            program.graph.erase_node(each)
        replace_quantize(node, codes, scale)


def _centered(quantize: fx.Node) -> list[fx.Node] | None:
    """The calls of `centered` that alone read codes and zero points of a quantize; None where something else does."""
    parts = [user for user in quantize.users if user.target is operator.getitem and user.args[1] in (0, 2)]
    readers = {reader for part in parts for reader in part.users}
    return None if any(reader.target is not CenteredCall.target for reader in readers) else list(readers)


def _insert(program: Program, node: fx.Node, fused: _Fused, spec: RowQuant, moved: dict[fx.Node, fx.Node]) -> fx.Node:
    """The kernel's node: before the quantize, or as early as the other consumers need what it writes."""
    operands = {name: fused.tensors.get(name) for name in TENSORS[1:-4]}
    call = RowQuantCall(fused.x, **operands, eps=fused.eps, spec=str(spec))
    if not fused.written:
        return call.insert(program, before=node)
    kernel = call.insert(program, after=fused.written[min(fused.written)][0])
    for index, (value, consumers) in fused.written.items():
        moved[value] = result = program.insert(operator.getitem, (kernel, index), after=kernel)
        value.replace_all_uses_with(result, delete_user_cb=consumers.__contains__)
    return kernel


def _walk_back(
    program: Program,
    x: fx.Node,
    norms: dict[fx.Node, Norm],
    moved: dict[fx.Node, fx.Node],
    capability: tuple[int, int],
    group: int,
) -> _Fused:
    """Walk back from what is quantized over what row_quant computes too."""
    fused, n = _Fused(x), int(x.meta["val"].shape[-1])
    replaced = _calls(x, QuantizeCall.target)  # consumers of x that the kernel replaces
    if HadamardCall.matches(x) and not _others(x, replaced) and fuses_hadamard(n, capability, group):
        transform = HadamardCall.of(x)
        fused.fields["hadamard"] = n
        x = fused.x = transform.x
        fused.tensors["signs"] = transform.signs
        replaced = _calls(x, HadamardCall.target)
    smoothed = None if x in norms or _others(x, replaced) else _divided(program, x)
    if smoothed is not None:
        fused.fields["smooth"], replaced = True, [x]
        name, device = f"{x.name}.smooth", x.meta["val"].device
        fused.x, vector = smoothed
        x, fused.tensors["smooth"] = fused.x, _constant(program, name, vector.float(), device)
    signs = fused.tensors.get("signs")
    if _others(x, replaced) and signs is not None and signs.op != "placeholder":
        return fused  # the kernel would have to stand before its signs
    norm = norms.get(x)
    if norm is not None and norm.input.meta["val"].dtype == x.meta["val"].dtype:
        _take_norm(program, norm, fused, moved)
    elif not _take_gate(x, fused):
        return fused
    others = _others(x, replaced)
    if others:
        fused.fields["value"], fused.written[_VALUE] = True, (x, others)
    return fused


def _take_norm(program: Program, norm: Norm, fused: _Fused, moved: dict[fx.Node, fx.Node]) -> None:
    """Fuse a norm, and the residual sum before it."""
    x, device, gain = norm.output, norm.input.meta["val"].device, norm.gain_value(program).float()
    fused.fields["first"], fused.eps = norm.kind, norm.eps
    fused.tensors["gain"] = _constant(program, f"{x.name}.gain", gain, device)
    if norm.kind == "layer":
        shift = program.weight_name(norm.bias)
        value = torch.zeros_like(gain) if shift is None else program.weights[shift].float()
        fused.tensors["shift"] = _constant(program, f"{x.name}.shift", value, device)
    fused.x = total = moved.get(norm.input, norm.input)
    if total.target is not aten.add.Tensor or total.kwargs:
        return
    a, b = total.args
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and same_type(a, b) and _in_memory(a) and _in_memory(b):
        fused.fields["residual"] = True
        fused.x, fused.tensors["residual"] = a, b
        fused.written[_TOTAL] = (total, _others(total, norm.inner))


def _take_gate(x: fx.Node, fused: _Fused) -> bool:
    """Fuse silu(a) b; False if x is something else."""
    if x.target is not aten.mul.Tensor:
        return False
    for gate, other in (x.args, x.args[::-1]):
        if not isinstance(gate, fx.Node) or not isinstance(other, fx.Node) or not same_type(gate, other):
            continue
        if gate.target is aten.silu.default:
            fused.fields["first"] = "gate"
            fused.x, fused.tensors["gate"] = cast(fx.Node, gate.args[0]), other  # silu has one operand, a tensor
            return True
    return False


def _divided(program: Program, x: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """x = y / s, or y * (1 / s), with a weight s [K] -> y and s in float64; None for anything else."""
    if x.target not in (aten.div.Tensor, aten.mul.Tensor) or x.kwargs or len(x.args) != 2:
        return None
    pairs = [x.args] if x.target is aten.div.Tensor else [x.args, x.args[::-1]]
    for y, s in pairs:
        name = program.weight_name(through_casts(s)) if isinstance(s, fx.Node) else None
        if name is None or not isinstance(y, fx.Node) or program.weight_name(y) is not None or not same_type(x, y):
            continue
        vector = program.weights[name].double()
        # one dimension of channels: [K], or [1, .., 1, K]
        if vector.numel() == vector.shape[-1] == x.meta["val"].shape[-1]:
            vector = vector.reshape(-1)
            return y, vector if x.target is aten.div.Tensor else 1 / vector
    return None


def same_type(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have one shape and one dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and tuple(x.shape) == tuple(y.shape)


def _in_memory(node: fx.Node) -> bool:
    while node.target in VIEWS:
        node = cast(fx.Node, node.args[0])  # the tensor that a view reads
    return node.op == "placeholder" or node.target in _IN_MEMORY or any(user.target in _KERNELS for user in node.users)


def _calls(x: fx.Node, target: Any) -> list[fx.Node]:
    return [user for user in x.users if user.target is target]


def _others(x: fx.Node, replaced: Iterable[fx.Node]) -> list[fx.Node]:
    """Consumers of x that the kernel does not replace."""
    return [user for user in x.users if user not in set(replaced)]


def _constant(program: Program, name: str, tensor: Tensor, device: torch.device) -> fx.Node:
    return program.node_of(name) if name in program.weights else program.add_weight(name, tensor.to(device))
