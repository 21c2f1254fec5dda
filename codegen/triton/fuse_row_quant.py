"""Lower every quantize of rows to row_quant, together with what stands before it.

    [residual sum] -> [norm | silu(a) b] -> [/ or * a vector of channels] -> [Hadamard] -> quantize

Walking back from the quantize, each is taken in if row_quant computes it too. A sum, a norm or a gate whose value
others read as well (a float site, a router, the residual stream) is taken in all the same: the kernel writes the value
beside the codes, and the others read that.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.norms import Norm, find_norms, through_casts
from qcompile.codegen import aten_fallback as plain
from qcompile.codegen.triton import triton_ops as _register  # noqa: F401  registers torch.ops.qcompile_triton
from qcompile.codegen.triton.gpu_kernel_choice import LOWEST
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.row_quant import LONGEST, fuses_hadamard
from qcompile.ir.program import Program
from qcompile.numerics.format import Format

aten = torch.ops.aten
ops = torch.ops.qcompile
kernels = torch.ops.qcompile_triton

# Their results lie in memory whatever Inductor does, and so does what a kernel of ours reads: a sum of two such values
# is a pass of its own. A sum with anything else (another norm, say) Inductor computes where that is, which reads less.
_STORED = frozenset({
    operator.getitem, aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten.embedding.default, kernels.linear_w.default, kernels.linear_a8.default,
})  # fmt: skip
_KERNELS = frozenset({kernels.linear_w.default, kernels.linear_a8.default, kernels.row_quant.default})
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


@dataclass
class _Before:
    """What is computed before rows are quantized.

    Attributes:
        x: where it starts. fields: of the spec. tensors: of the operator. eps: of the norm.
        written: what the kernel writes for others: its index among the results -> the node, and who reads it.
    """

    x: fx.Node
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, fx.Node] = field(default_factory=dict)
    eps: float = 0.0
    written: dict[int, tuple[fx.Node, list[fx.Node]]] = field(default_factory=dict)


def quantize_rows(program: Program, capability: tuple[int, int]) -> None:
    """Rewrite every quantize that row_quant computes, in place.

    Args:
        program: after the products were lowered. capability: of the GPU.
    """
    norms = {norm.output: norm for norm in find_norms(program)}
    moved: dict[fx.Node, fx.Node] = {}  # a value -> the result of a kernel that others read in its place
    made: dict[tuple[fx.Node, str], fx.Node] = {}
    for node in list(program.graph.find_nodes(op="call_function", target=ops.quantize.default)):
        x, act = node.args
        form, value = Format.parse(act), x.meta["val"]
        known = form.dtype in ("int8", "fp8") and form.per == "row" and form.zero == "none"
        known = known and capability >= LOWEST.get(form.dtype, (8, 0))
        if not known or value.dtype not in NAMES or int(value.shape[-1]) > LONGEST:
            continue
        if (x, act) not in made:
            before = _before(program, x, norms, moved, capability)
            spec = RowQuant(NAMES[value.dtype], **before.fields, codes=form.dtype)
            made[x, act] = _insert(program, node, before, spec, moved)
        codes, scale = (program.insert(operator.getitem, (made[x, act], index), before=node) for index in (0, 1))
        plain.replace_quantize(node, codes, scale)


def _insert(program: Program, node: fx.Node, before: _Before, spec: RowQuant, moved: dict[fx.Node, fx.Node]) -> fx.Node:
    """The kernel's node: before the quantize, or as early as those need it who read what it writes."""
    names = ("residual", "gate", "gain", "shift", "smooth", "signs")
    args = (before.x, *(before.tensors.get(name) for name in names), before.eps, str(spec))
    if not before.written:
        return program.insert(kernels.row_quant.default, args, before=node)
    found = program.insert(kernels.row_quant.default, args, after=before.written[min(before.written)][0])
    for index, (value, consumers) in before.written.items():
        moved[value] = result = program.insert(operator.getitem, (found, index), after=found)
        value.replace_all_uses_with(result, delete_user_cb=lambda user, consumers=consumers: user in consumers)
    return found


def _before(
    program: Program,
    x: fx.Node,
    norms: dict[fx.Node, Norm],
    moved: dict[fx.Node, fx.Node],
    capability: tuple[int, int],
) -> _Before:
    """Walk back from what is quantized over what row_quant computes too."""
    found, n = _Before(x), int(x.meta["val"].shape[-1])
    ours = _calls(x, ops.quantize.default)
    if x.target is ops.hadamard.default and not _others(x, ours) and fuses_hadamard(n, capability):
        found.fields["hadamard"] = n
        found.x, found.tensors["signs"] = x.args
        x = found.x
        ours = _calls(x, ops.hadamard.default)
    smoothed = None if x in norms or _others(x, ours) else _divided(program, x)
    if smoothed is not None:
        found.fields["smooth"], ours = True, [x]
        name, device = f"{x.name}.smooth", x.meta["val"].device
        found.x, vector = smoothed
        x, found.tensors["smooth"] = found.x, _constant(program, name, vector.float(), device)
    signs = found.tensors.get("signs")
    if _others(x, ours) and signs is not None and signs.op != "placeholder":
        return found  # the kernel would have to stand before its signs
    norm = norms.get(x)
    if norm is not None and norm.input.meta["val"].dtype == x.meta["val"].dtype:
        _take_norm(program, norm, found, moved)
    elif not _take_gate(x, found):
        return found
    others = _others(x, ours)
    if others:
        found.fields["value"], found.written[3] = True, (x, others)
    return found


def _take_norm(program: Program, norm: Norm, found: _Before, moved: dict[fx.Node, fx.Node]) -> None:
    x, device, gain = norm.output, norm.input.meta["val"].device, norm.gain_value(program).float()
    found.fields["first"], found.eps = norm.kind, norm.eps
    found.tensors["gain"] = _constant(program, f"{x.name}.gain", gain, device)
    if norm.kind == "layer":
        shift = program.weight_name(norm.bias)
        value = torch.zeros_like(gain) if shift is None else program.weights[shift].float()
        found.tensors["shift"] = _constant(program, f"{x.name}.shift", value, device)
    found.x = total = moved.get(norm.input, norm.input)
    if total.target is not aten.add.Tensor or total.kwargs:
        return
    a, b = total.args
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and alike(a, b) and _stored(a) and _stored(b):
        found.fields["residual"] = True
        found.x, found.tensors["residual"] = a, b
        found.written[2] = (total, _others(total, norm.inner))


def _take_gate(x: fx.Node, found: _Before) -> bool:
    if x.target is not aten.mul.Tensor:
        return False
    for gate, other in (x.args, x.args[::-1]):
        both = isinstance(gate, fx.Node) and isinstance(other, fx.Node) and alike(gate, other)
        if both and gate.target is aten.silu.default:
            found.fields["first"] = "gate"
            found.x, found.tensors["gate"] = gate.args[0], other
            return True
    return False


def _divided(program: Program, x: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """x = y / s, or y * (1 / s), with a weight s [K] -> y and s in float64; None for anything else."""
    if x.target not in (aten.div.Tensor, aten.mul.Tensor) or x.kwargs or len(x.args) != 2:
        return None
    pairs = [x.args] if x.target is aten.div.Tensor else [x.args, x.args[::-1]]
    for y, s in pairs:
        name = program.weight_name(through_casts(s)) if isinstance(s, fx.Node) else None
        if name is None or not isinstance(y, fx.Node) or program.weight_name(y) is not None or not alike(x, y):
            continue
        vector = program.weights[name].double()
        # one dimension of channels: [K], or [1, .., 1, K]
        if vector.numel() == vector.shape[-1] == x.meta["val"].shape[-1]:
            vector = vector.reshape(-1)
            return y, vector if x.target is aten.div.Tensor else 1 / vector
    return None


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have one shape and one dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and tuple(x.shape) == tuple(y.shape)


def _stored(node: fx.Node) -> bool:
    while node.target in _VIEWS:
        node = node.args[0]
    return node.op == "placeholder" or node.target in _STORED or any(user.target in _KERNELS for user in node.users)


def _calls(x: fx.Node, target: Any) -> list[fx.Node]:
    return [user for user in x.users if user.target is target]


def _others(x: fx.Node, ours: Iterable[fx.Node]) -> list[fx.Node]:
    return [user for user in x.users if user not in set(ours)]


def _constant(program: Program, name: str, tensor: Tensor, device: torch.device) -> fx.Node:
    return program.node_of(name) if name in program.weights else program.add_weight(name, tensor.to(device))
