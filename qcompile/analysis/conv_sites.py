"""Convolutions whose weight is the model's own: what trains in fixed point beside the linear sites.

Found by arithmetic, as the sites of sites.py: a convolution in one or two dimensions with zeros as its margins, and a
weight of the program straight as its operand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from qcompile.ir.aten_ops import aten
from qcompile.ir.program import Program

_PLAIN: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}
_NAMED_PADDING: dict[Any, int] = {aten.conv1d.padding: 1, aten.conv2d.padding: 2}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class ConvSite:
    """One convolution.

    Attributes:
        name: the weight's attribute path; what rules match and reports print.
        node: the convolution.
        input: [B, C, ..].
        weight: the placeholder of the weight, [O, C / groups, ..].
        bias: [O], or None.
        stride: for each spatial dimension, as padding and dilation.
        padding: zeros on both sides.
        dilation: between the elements of a window.
        groups: of channels.
    """

    name: str
    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def find_conv_sites(program: Program) -> list[ConvSite]:
    """All of a program in graph order."""
    found = [_site(program, node) for node in program.graph.nodes if node.op == "call_function"]
    return [site for site in found if site is not None]


def _site(program: Program, node: fx.Node) -> ConvSite | None:
    spatial = _PLAIN.get(node.target) or _NAMED_PADDING.get(node.target)
    if spatial is None:
        return None
    values = {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    x, weight, bias = values["input"], values["weight"], values["bias"]
    name = program.weight_name(weight)
    if name is None or not isinstance(x, fx.Node) or x.meta["val"].ndim != spatial + 2:
        return None
    if bias is not None and program.weight_name(bias) is None:
        return None
    stride, dilation = (_sizes(values[key], spatial) for key in ("stride", "dilation"))
    padding = _padding(values, weight, spatial, dilation)
    if padding is None:
        return None
    return ConvSite(name, node, x, weight, bias, stride, padding, dilation, int(values["groups"]))


def _sizes(value: Any, spatial: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * spatial if len(given) == 1 else given


def _padding(
    values: Mapping[str, Any], weight: fx.Node, spatial: int, dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Zeros on both sides, or None where the two differ."""
    padding = values["padding"]
    if not isinstance(padding, str):
        return _sizes(padding, spatial)
    if padding == "valid":
        return (0,) * spatial
    reach = [d * (int(k) - 1) for d, k in zip(dilation, weight.meta["val"].shape[2:], strict=True)]
    return tuple(r // 2 for r in reach) if all(r % 2 == 0 for r in reach) else None
