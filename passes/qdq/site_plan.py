"""What to quantize and how: the config `Quantize`, its formats for each site, and the plan that rules make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile.analysis.sites import Site, find_sites
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.recipe.recipe import RecipeError, Rule
from qcompile.recipe.report import PassReport

ops = torch.ops.qcompile
aten = torch.ops.aten

_PRODUCTS = {
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
}


# Rewritings of the float model, and what must stand before codes are chosen.
EXACT = (
    "Untie",
    "FoldNorm",
    "SmoothQuant",
    "SmoothAttention",
    "SmoothQuantPlus",
    "AWQ",
    "ReorderChannels",
    "Rotate",
    "OnlineHadamard",
)
BEFORE = (*EXACT, "IntactKV", "QuantizeKV")


@dataclass(frozen=True)
class Quantize:
    """Formats of weights and activations; None keeps the activation float.

    The last product (the logits) is the most sensitive one and in decoding as large as any: it has
    formats of its own; `lm_head` None treats it as every other site.
    """

    weight: Format = Format("int8")
    act: Format | None = Format("int8")
    lm_head: Format | None = Format("int8")  # of sites that write the graph's output
    lm_head_act: Format | None = None  # of their activations
    clip: bool = False  # search the clip of each weight range that minimises sum |e|^2.4

    def __post_init__(self) -> None:
        for name in ("weight", "act", "lm_head", "lm_head_act"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Format.parse(getattr(self, name)))
        for act in (self.act, self.lm_head_act):
            if act is not None and act.two_level:
                raise RecipeError(f"Quantize: an activation has no second level ({act})")
        if self.weight.smooth:
            raise RecipeError(f"Quantize: smooth is for activations, not for a weight ({self.weight})")


@dataclass(frozen=True)
class SitePlan:
    """What a recipe's rules and the caller say of single sites, and the data to choose codes with.

    Attributes:
        rules: the first matching rule of a site name, or None; a pass may write formats here for the quantizing
            pass behind it (PerTensorActivations). keep: sites to leave float -> reason.
        batches: a fresh iterator of the program's flat inputs, for passes that need data.
        corrected: a later pass compares the codes with the float weights: hold these.
        progress: show bars. reference: the program before all passes. made: tensors that earlier
            passes made for the calls of the module (report.py).
    """

    rules: dict[str, Rule | None] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    batches: Callable[[], Iterable[Sequence[Any]]] | None = None
    corrected: bool = False
    progress: bool = False
    reference: Program | None = None
    made: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedSite:
    """A site to quantize, and its formats; `last`: it makes the logits, in the recipe's own format for them."""

    site: Site
    weight: Format
    act: Format | None
    last: bool = False


def planned_sites(program: Program, config: Quantize, plan: SitePlan, report: PassReport) -> list[PlannedSite]:
    """The sites to quantize, in graph order; the others are left with their reasons."""
    found = []
    for site in find_sites(program):
        rule = plan.rules.get(site.name)
        if site.name in plan.keep:
            report.skip(site.name, plan.keep[site.name])
        elif rule is not None and rule.keep:
            report.skip(site.name, f"kept float by the rule {rule.match!r}")
        elif rule is None and chooses_experts(site):
            report.skip(site.name, "its output chooses experts: one flipped choice costs more than its bytes")
        elif site.kind == "experts" and not (site.grouped or site.batched):
            report.skip(site.name, "neither rows sorted by expert nor [E, T, K] by [E, K, N]", site.node.name)
        else:
            last = config.lm_head is not None and (rule is None or rule.weight is None) and writes_output(site)
            found.append(PlannedSite(site, *formats_of(site, config, rule), last))
    return found


def formats_of(site: Site, config: Quantize, rule: Rule | None) -> tuple[Format, Format | None]:
    """Weight and activation format of one site."""
    weight, act = config.weight, config.act
    if config.lm_head is not None and writes_output(site):
        weight, act = config.lm_head, config.lm_head_act
    if rule is not None:
        weight, act = rule.weight or weight, rule.act or act
    return weight, None if site.kind == "experts" else act


def writes_output(site: Site) -> bool:
    """Whether what a site computes reaches the graph's outputs and no further product."""
    work, statistics = list(site.node.users), set()
    meets_output = False
    while work:
        node = work.pop()
        if node in statistics:
            continue
        statistics.add(node)
        if node.op == "output":
            meets_output = True
        elif node.target in _PRODUCTS:
            return False
        work += list(node.users)
    return meets_output


def chooses_experts(site: Site) -> bool:
    """Whether the output of a site reaches a top-k through elementwise operations only."""
    work, statistics = [site.node], set()
    while work:
        node = work.pop()
        if node.target is torch.ops.aten.topk.default:
            return True
        shape = node.meta["val"].shape[-1:] if hasattr(node.meta.get("val"), "shape") else None
        if node in statistics or shape != site.node.meta["val"].shape[-1:]:
            continue
        statistics.add(node)
        work += [u for u in node.users if u.target is not torch.ops.aten.linear.default]
    return False
