"""Quantize: weights to nearest, activations dynamically, as plain quantize/dequantize around matmuls.

Source: "Give Me BF16 or Give Me Death", arXiv:2411.02355 sec. 3 (round to nearest, dynamic per-token
        activations); MSE clip from GPTQ's code (arXiv:2210.17323).
Law:    |w - dq(q(w))| <= s / 2 inside the range; the inserted graph is the meaning of the result.
Needs:  nothing.   Leaves: sites that a rule keeps, expert stacks, weights shared with a float reader
        are copied (the other reader keeps the float table).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.calibrate import Statistics
from qcompile.formats import Format, quantize_tensor
from qcompile.program import Program
from qcompile.recipe import RecipeError, Rule, rewrites
from qcompile.report import PassReport
from qcompile.sharing import fingerprint, shared
from qcompile.sites import Site, find_sites

ops = torch.ops.qcompile
aten = torch.ops.aten

_PRODUCTS = {
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
}


@dataclass(frozen=True)
class Quantize:
    """Formats of weights and activations; None keeps the activation float.

    The last product (the logits) is the most sensitive one and in decoding as large as any: it is
    quantized weight-only, in `output`; None treats it as every other site.
    """

    weight: Format = Format("int8")
    act: Format | None = Format("int8")
    output: Format | None = Format("int8")  # weight-only, for sites that write the graph's output
    clip: bool = False  # search the clip of each weight range that minimises sum |e|^2.4

    def __post_init__(self) -> None:
        for name in ("weight", "act", "output"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Format.parse(getattr(self, name)))
        if self.act is not None and self.act.dual:
            raise RecipeError("Quantize: an activation has no second level (dual)")


@rewrites(Quantize, exact=False, after=("Untie", "FoldNorm", "Smooth", "Rotate", "RotateOnline"))
def quantize(
    program: Program,
    how: Quantize,
    seen: Statistics,
    rules: dict[str, Rule | None] | None = None,
    keep: dict[str, str] | None = None,
) -> PassReport:
    """Insert Q/DQ at every site that no rule keeps, in place.

    Args:
        program, how, seen: as for every pass. rules: the rule of each site name, or None.
        keep: sites to leave float, with the reason.
    """
    report = PassReport("Quantize")
    for site in find_sites(program):
        rule = (rules or {}).get(site.name)
        if keep and site.name in keep:
            report.leave(site.name, keep[site.name])
        elif rule is not None and rule.keep:
            report.leave(site.name, f"kept float by the rule {rule.match!r}")
        elif rule is None and chooses_experts(site):
            report.leave(site.name, "its output chooses experts: one flipped choice costs more than its bytes")
        elif site.kind != "linear":
            report.leave(site.name, "a stack of expert weights has no quantized kernel yet", site.node.name)
        else:
            weight, act = formats_of(site, how, rule)
            _quantize_site(program, site, weight, act, how.clip)
            report.done.append(site.name)
    return report


def formats_of(site: Site, how: Quantize, rule: Rule | None) -> tuple[Format, Format | None]:
    """Weight and activation format of one site."""
    weight, act = how.weight, how.act
    if how.output is not None and writes_output(site):
        weight, act = how.output, None
    if rule is not None:
        weight, act = rule.weight or weight, rule.act or act
    return weight, act


def writes_output(site: Site) -> bool:
    """Whether what a site computes reaches the graph's outputs and no further product."""
    work, seen = list(site.node.users), set()
    meets_output = False
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "output":
            meets_output = True
        elif node.target in _PRODUCTS:
            return False
        work += list(node.users)
    return meets_output


def chooses_experts(site: Site) -> bool:
    """Whether the output of a site reaches a top-k through elementwise operations only."""
    work, seen = [site.node], set()
    while work:
        node = work.pop()
        if node.target is torch.ops.aten.topk.default:
            return True
        shape = node.meta["val"].shape[-1:] if hasattr(node.meta.get("val"), "shape") else None
        if node in seen or shape != site.node.meta["val"].shape[-1:]:
            continue
        seen.add(node)
        work += [u for u in node.users if u.target is not torch.ops.aten.linear.default]
    return False


def _quantize_site(program: Program, site: Site, weight: Format, act: Format | None, clip: bool) -> None:
    original = program.weights[site.name]

    def make() -> tuple[Tensor | None, ...]:
        try:
            q = quantize_tensor(original, weight, clip=clip)
        except ValueError as error:
            raise RecipeError(f"Quantize: the weight {site.name} cannot be quantized: {error}") from error
        return q.stored(), q.scale, q.zero, q.group_scale

    made = shared(("codes", fingerprint(original), str(weight), clip), make)
    program.alive.append(made)
    dtype = site.node.meta["val"].dtype
    nodes = add_stored(program, site.name, made.tensors)
    numbers = program.insert(ops.dequantize.default, (*nodes, str(weight), site.K, original.dtype), before=site.node)
    x = site.input
    if act is not None:
        codes, scale, zero = quantized_input(program, x, act)
        x = program.insert(
            ops.dequantize.default,
            (codes, scale, zero if act.zero != "none" else None, None, str(act), 0, dtype),
            before=site.node,
        )
    site.node.args = (x, numbers, *site.node.args[2:])


def add_stored(program: Program, name: str, tensors: tuple[Tensor | None, ...]) -> tuple[object, ...]:
    """Add stored codes, scale, zero and group scale as weights "<name>.codes", ..; absent ones are None."""
    found: list[object] = []
    for part, tensor in zip(("codes", "scale", "zero", "group_scale"), tensors, strict=True):
        full = f"{name}.{part}"
        if tensor is None:
            found.append(None)
        elif full in program.weights:  # two sites on one weight share its codes
            found.append(program.node_of(full))
        else:
            found.append(program.add_weight(full, tensor))
    return tuple(found)


def quantized_input(program: Program, x: object, act: Format) -> tuple[object, object, object]:
    """The codes, scale and zero of a value: one quantization for all sites that read it."""
    import operator

    assert isinstance(x, torch.fx.Node)
    for user in x.users:
        if user.target is ops.quantize.default and user.args[1] == str(act):
            codes, scale, zero = sorted(user.users, key=lambda n: n.args[1])
            return codes, scale, zero
    pair = program.insert(ops.quantize.default, (x, str(act)), after=x)
    parts: list[object] = []
    last = pair
    for index in range(3):
        last = program.insert(operator.getitem, (pair, index), after=last)
        parts.append(last)
    return tuple(parts)
