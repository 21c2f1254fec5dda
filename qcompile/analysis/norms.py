"""Norms, found by the arithmetic and not by a module class.

    RMSNorm    y = x / sqrt(mean(x^2) + eps) * g          as one op, or pow, mean, rsqrt, mul
    (1+w)      y = x / sqrt(mean(x^2) + eps) * (1 + w)    the stored weight is the gain minus one
    LayerNorm  y = (x - mean x) / sqrt(var x + eps) * g + b

Only norms over the last dimension are norms here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.ir.aten_ops import aten, is_cast
from qcompile.ir.program import Program
from qcompile.ir.size_hint import hint


def through_casts(node: fx.Node) -> fx.Node:
    """The value before any casts."""
    while is_cast(node):
        node = node.args[0]
    return node


@dataclass(frozen=True)
class Norm:
    """One norm over the last dimension, of n channels.

    Attributes:
        kind: RMSNorm or LayerNorm.
        input: the value that is normalized, [.., n].
        output: the value that consumers read, [.., n].
        gain: the placeholder of its weight, [n], or None.
        bias: the placeholder of its bias, [n], or None.
        one_plus: whether the gain is 1 + weight.
        eps: added to the mean of squares, or to the variance.
        inner: all nodes from the input (exclusive) to the output (inclusive).
    """

    kind: Literal["rms", "layer"]
    input: fx.Node
    output: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None
    one_plus: bool
    eps: float
    inner: frozenset[fx.Node]

    def gain_value(self, program: Program) -> Tensor:
        """The factor of each channel, [n] float64 on the CPU, as all vectors of channels; ones for a norm without."""
        n = hint(self.input.meta["val"].shape[-1])
        if self.gain is None:
            return torch.ones(n, dtype=torch.float64)
        stored = program.weight_of(self.gain).cpu().double()
        return stored + 1 if self.one_plus else stored

    def set_gain(self, program: Program, gain: Tensor) -> None:
        """Store a new gain [n], in the form and the dtype that the model keeps it in.

        Raises:
            ValueError: the norm has none.
        """
        name = program.weight_name(self.gain)
        if name is None:
            raise ValueError(f"the norm at {self.output.name} has no gain to set")
        old = program.weights[name]
        program.weights[name] = (gain - 1 if self.one_plus else gain).to(old)

    def has_unit_gain(self, program: Program) -> bool:
        """Whether gain is exactly one and bias exactly zero."""
        if not bool((self.gain_value(program) == 1).all()):
            return False
        name = program.weight_name(self.bias)
        return name is None or not bool(program.weights[name].any())


def find_norms(program: Program) -> list[Norm]:
    """All norms of a program in graph order."""
    found: list[Norm] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (aten.layer_norm.default, aten.rms_norm.default):
            norm = _single_op(program, node)
        elif node.target is aten.rsqrt.default:
            norm = _decomposed_rms(program, node)
        else:
            continue
        if norm is not None:
            found.append(norm)
    return found


def _single_op(program: Program, node: fx.Node) -> Norm | None:
    args = list(node.args) + [None] * 4
    if len(args[1]) != 1:
        return None
    layer = node.target is aten.layer_norm.default
    gain, bias = args[2], args[3] if layer else None
    for weight in (gain, bias):
        if weight is not None and program.weight_name(weight) is None:
            return None
    source: fx.Node = args[0]
    kind: Literal["rms", "layer"] = "layer" if layer else "rms"
    eps = args[4] if layer else args[3]
    if eps is None:  # LayerNorm's default, or the dtype's as torch has it for RMSNorm
        eps = 1e-5 if layer else torch.finfo(source.meta["val"].dtype).eps
    return Norm(kind, source, node, gain, bias, False, eps, frozenset({node}))


def _decomposed_rms(program: Program, rsqrt: fx.Node) -> Norm | None:
    """pow/mul -> mean(-1) -> + eps -> rsqrt -> * x -> [casts] -> [* gain]."""
    add = rsqrt.args[0]
    if not isinstance(add, fx.Node) or add.target is not aten.add.Tensor:
        return None
    mean, eps = add.args
    if not isinstance(eps, (int, float)) or not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    dims = list(mean.args[1])
    square = mean.args[0]
    if not isinstance(square, fx.Node) or dims not in ([-1], [square.meta["val"].ndim - 1]):
        return None
    if mean.meta["val"].ndim != square.meta["val"].ndim:  # without the dimension it meets other channels
        return None
    if square.target is aten.pow.Tensor_Scalar and square.args[1] == 2:
        wide = square.args[0]
    elif square.target is aten.mul.Tensor and square.args[0] is square.args[1]:
        wide = square.args[0]
    else:
        return None
    assert isinstance(wide, fx.Node)
    source = through_casts(wide)
    for product in rsqrt.users:
        if product.target is not aten.mul.Tensor:
            continue
        other = product.args[1] if product.args[0] is rsqrt else product.args[0]
        if isinstance(other, fx.Node) and through_casts(other) is source:
            break
    else:
        return None
    inner = {add, mean, square, rsqrt, product}
    for cast in (wide, other):
        while cast is not source:
            inner.add(cast)
            cast = cast.args[0]
    # A model in low precision casts up before the norm and adds the residual in the cast-up value:
    # the cast is then not the norm's own, and the norm reads the cast.
    for cast in [n for n in inner if is_cast(n)]:
        if any(user not in inner for user in cast.users):
            source, inner = cast, inner - {cast}
            break
    return _with_gain(program, source, product, float(eps), inner)


def _with_gain(program: Program, source: fx.Node, product: fx.Node, eps: float, inner: set[fx.Node]) -> Norm:
    output, node = product, product
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_cast(user):
            node = user
            inner.add(user)
            output = user
            continue
        if user.target is not aten.mul.Tensor:
            break
        other = user.args[1] if user.args[0] is node else user.args[0]
        gain, one_plus, nodes = _gain_expression(program, other, hint(source.meta["val"].shape[-1]))
        if gain is None:
            break
        inner |= nodes | {user}
        output = user
        while len(output.users) == 1 and is_cast(next(iter(output.users))):
            output = next(iter(output.users))
            inner.add(output)
        return Norm("rms", source, output, gain, None, one_plus, eps, frozenset(inner))
    return Norm("rms", source, output, None, None, False, eps, frozenset(inner))


def _gain_expression(program: Program, value: object, n: int) -> tuple[fx.Node | None, bool, set[fx.Node]]:
    """A weight [n], or 1 + weight, through casts that nothing else reads."""
    nodes: set[fx.Node] = set()
    one_plus = False
    while isinstance(value, fx.Node) and program.weight_name(value) is None:
        if len(value.users) > 1:
            return None, False, set()
        if is_cast(value):
            nodes.add(value)
            value = value.args[0]
        elif value.target is aten.add.Tensor and not one_plus and 1 in value.args and not value.kwargs:
            nodes.add(value)
            one_plus = True
            value = value.args[0] if isinstance(value.args[0], fx.Node) else value.args[1]
        else:
            return None, False, set()
    if not isinstance(value, fx.Node) or tuple(value.meta["val"].shape) != (n,):
        return None, False, set()
    return value, one_plus, nodes
