"""PerTensor: activations in one step for all tokens, at the sites where tokens are about as large as each other.

A step for each token divides every row before a product and multiplies it after; one step for all (ONNX's
DynamicQuantizeLinear) leaves that to the product's own scale. Most inputs are norms' outputs, whose tokens are alike;
massive activations of a few tokens (arXiv:2402.17762) shrink all others' codes at the rest, which stay as they are.

Law:    a site is changed only if one step for all tokens moves its products, over the calibration text, at most
        `most` times as far as a step for each. How far is the root mean square over tokens of
        |(q(x) - x) W^T| / |x W^T|: every token counts alike, or the massive ones, which lose nothing, would hide what
        the others lose. Sites that read the same value are judged together: they can still be multiplied as one.
Needs:  the sites' inputs.   Leaves: the graph as it is; the quantizing pass behind it takes the formats from here.
        What a token becomes then depends on the tokens beside it in the same call.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, fx

from qcompile.calibrate import CalibrationError, Statistics
from qcompile.formats import Format
from qcompile.passes.quantize import BEFORE, Quantize, SitePlan
from qcompile.passes.sequential import as_rounded
from qcompile.program import Program
from qcompile.recipe import RecipeError, Rule, rewrites
from qcompile.report import PassReport
from qcompile.sites import Site, find_sites
from qcompile.walk import Walk


@dataclass(frozen=True)
class PerTensor:
    """One step for all tokens where that is `most` times as far from the float product as a step for each."""

    act: Format = Format("int8", "tensor")
    most: float = 1.6  # norms' outputs are below it, inputs of massive activations far above

    def __post_init__(self) -> None:
        if isinstance(self.act, str):
            object.__setattr__(self, "act", Format.parse(self.act))
        if self.act.per != "tensor" or self.act.is_float:
            raise RecipeError(f"PerTensor: act must be integers in one step for a tensor, got {self.act}")
        if self.most < 1:
            raise RecipeError(f"PerTensor: most must be at least 1, got {self.most}")


def _behind(config: PerTensor, passes: tuple[object, ...]) -> list[str]:
    place = passes.index(config)
    if any(isinstance(other, Quantize) for other in passes[place:]):
        return []
    return ["PerTensor chooses formats for the quantizing pass behind it: add one"]


@rewrites(PerTensor, exact=False, needs=("inputs",), sitewise=True, after=BEFORE, conflicts=_behind)
def per_tensor(program: Program, how: PerTensor, seen: Statistics, plan: SitePlan) -> PassReport:
    """Write the formats of the chosen sites into the plan's rules."""
    report = PassReport("PerTensor")
    groups: dict[fx.Node, list[Site]] = {}
    for site in find_sites(program):
        rule = plan.rules.get(site.name)
        if site.kind == "linear" and site.name not in plan.keep and not (rule and (rule.keep or rule.act)):
            groups.setdefault(site.input, []).append(site)
    assert plan.batches is not None
    walk = Walk(program, plan.batches())
    if not walk.values:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    found: dict[str, float] = {}
    for members in track(groups.values(), report.name, disable=not plan.progress, transient=True):
        walk.advance(members[0].node)
        weight = torch.cat([program.weights[site.name].float() for site in members])
        times = farther(list(walk.see(members[0].input)), weight, how.act)
        found |= {site.name: times for site in members}
    for name, times in found.items():
        if times > how.most:
            report.leave(name, f"one step for all tokens is {times:.1f} times as far as a step for each")
            continue
        rule = plan.rules.get(name)
        plan.rules[name] = dataclasses.replace(rule, act=how.act) if rule else Rule(name, act=how.act)
        report.done.append(name)
    report.notes.append(
        f"{len(report.done)} of {len(found)} sites in one step for all tokens{_ranges(found, how.most)}"
    )
    return report


def _ranges(found: dict[str, float], most: float) -> str:
    """How far these are, and the others."""
    parts = [sorted(t for t in found.values() if (t <= most) == chosen) for chosen in (True, False)]
    words = [
        f"{who} {t[0]:.2f} to {t[-1]:.2f} times as far" for who, t in zip(("these", "others"), parts, strict=True) if t
    ]
    return f" ({', '.join(words)})" if words else ""


def farther(inputs: list[Tensor], weight: Tensor, act: Format) -> float:
    """How many times as far one step for all tokens moves x W^T as a step for each; x [.., T, K], weight [N, K]."""
    each = dataclasses.replace(act, per="row")
    sums = [0.0, 0.0]
    for x in inputs:
        size = _sizes(x, weight)
        for index, form in enumerate((act, each)):
            moved = _sizes(as_rounded(x, form).float() - x.float(), weight)
            sums[index] += float((moved[size > 0] / size[size > 0]).sum())
    return (sums[0] / sums[1]) ** 0.5 if sums[1] else (1.0 if not sums[0] else float("inf"))


def _sizes(x: Tensor, weight: Tensor) -> Tensor:
    """|x W^T|^2 of every token, float64."""
    return (x.flatten(0, -2).float() @ weight.t()).square().sum(-1, dtype=torch.float64)
