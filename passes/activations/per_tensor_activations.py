"""PerTensorActivations: activations in one step for all tokens, at the sites where tokens are about as large as each other.

A step for each token divides every row before a product and multiplies it after; one step for all is a number that the
product takes by itself. Most inputs are norms' outputs, whose tokens are alike; massive activations of a few tokens
(arXiv:2402.17762) shrink all others' codes at the rest, which stay as they are.

Law:    a site is changed only if one step for all tokens moves its products, over the calibration text, at most
        `most` times as far as a step for each. How far is the root mean square over tokens of
        |(q(x) - x) W^T| / |x W^T|: every token counts alike, or the massive ones, which lose nothing, would hide what
        the others lose. Sites that read the same value are judged together: they can still be multiplied as one.
Needs:  the sites' inputs, and a quantizing pass behind it whose activations are the same with a step for each token.
Leaves: the graph as it is, and the formats in the plan's rules. What a token becomes then depends on the tokens beside
        it in the same call. What chooses experts stays float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.sites import Site
from qcompile.calibration.hessian import refuse_infinite
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.passes.qdq.site_plan import Quantize, chooses_experts, writes_output
from qcompile.passes.weights.sequential import as_rounded
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError, Rule


@dataclass(frozen=True)
class PerTensorActivations(PassConfig):
    """One step for all tokens where that moves products at most `most` times as far as a step for each.

    act: the format of those sites. lm_head: the logits too, if that is what they read.
    """

    act: Format = Format("int8", "tensor")
    lm_head: bool = False
    most: float = 1.6  # norms' outputs are below it, inputs of massive activations far above

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act.per != "tensor" or self.act.is_float:
            raise RecipeError(f"PerTensorActivations: act must be integers in one step for a tensor, got {self.act}")
        if self.most < 1:
            raise RecipeError(f"PerTensorActivations: most must be at least 1, got {self.most}")


def _conflicts(config: PerTensorActivations, passes: Sequence[PassConfig]) -> list[str]:
    quantizer = next((other for other in passes[passes.index(config) :] if isinstance(other, Quantize)), None)
    if quantizer is None:
        return ["PerTensorActivations chooses formats for the quantizing pass behind it: add one"]
    each, name = dataclasses.replace(config.act, per="row"), type(quantizer).__name__
    faults = []
    if quantizer.act != each:
        faults.append(f"PerTensorActivations({config.act}) needs act={each} in {name}, which has {quantizer.act}")
    if config.lm_head and quantizer.lm_head is not None and quantizer.lm_head_act != each:
        faults.append(
            f"PerTensorActivations(lm_head=True) needs lm_head_act={each} in {name}, which has {quantizer.lm_head_act}: "
            "give it, or leave the logits out"
        )
    return faults


@rewrites(PerTensorActivations, Stage.ACTIVATIONS, exact=False, needs=("batches",), conflicts=_conflicts)
def per_tensor_activations(program: Program, config: PerTensorActivations, context: PassContext) -> PassReport:
    """Write the formats of the chosen sites into the plan's rules."""
    report = PassReport("PerTensorActivations")
    groups: dict[fx.Node, list[Site]] = {}
    for site in context.facts.sites:
        rule = context.rules.get(site.name)
        if site.kind != "linear" or site.name in context.keep_float or (rule and (rule.keep or rule.act)):
            continue
        if rule is None and chooses_experts(site):
            report.skip(site.name, "its output chooses experts")
        elif config.lm_head or not writes_output(site):
            groups.setdefault(site.input, []).append(site)
    run = context.layerwise_run(program)
    found: dict[str, float] = {}
    for members in context.track(groups.values(), report.name):
        run.advance(members[0].node)
        weight = torch.cat([program.weights[site.name].float() for site in members])
        refuse_infinite(run, members[0])
        times = farther(list(run.see(members[0].input)), weight, config.act)
        for site in members:  # one that is called at several places must do at all of them
            found[site.name] = max(found.get(site.name, 0.0), times)
    for name, times in found.items():
        if not times <= config.most:
            report.skip(name, f"one step for all tokens is {times:.1f} times as far as a step for each")
            continue
        rule = context.rules.get(name)
        context.rules[name] = dataclasses.replace(rule, act=config.act) if rule else Rule(name, act=config.act)
        report.done.append(name)
    chosen = f"{len(report.done)} of {len(found)} sites in one step for all tokens"
    report.notes.append(f"{chosen} ({', '.join(_ranges(found, config.most))})")
    return report


def _ranges(found: dict[str, float], most: float) -> list[str]:
    """How far these are, and the others."""
    parts = [sorted(t for t in found.values() if (t <= most) == below) for below in (True, False)]
    named = zip(("these", "others"), parts, strict=True)
    return [f"{who} {part[0]:.2f} to {part[-1]:.2f} times as far" for who, part in named if part]


def farther(inputs: list[Tensor], weight: Tensor, act: Format) -> float:
    """How many times as far one step for all tokens moves x W^T as a step for each; x [.., T, K], weight [N, K]."""
    each = dataclasses.replace(act, per="row")
    gram = weight.t() @ weight if weight.shape[0] > weight.shape[1] else None  # |x W^T|^2 = x W^T W x^T
    sums = [0.0, 0.0]
    for x in inputs:
        size = _sizes(x.float(), weight, gram)
        for index, form in enumerate((act, each)):
            moved = _sizes(as_rounded(x, form).float() - x.float(), weight, gram)
            sums[index] += float((moved[size > 0] / size[size > 0]).sum())
    return (sums[0] / sums[1]) ** 0.5 if sums[1] else (1.0 if not sums[0] else float("inf"))


def _sizes(x: Tensor, weight: Tensor, gram: Tensor | None) -> Tensor:
    """|x W^T|^2 of every token, float64, without [T, N] where that is more than [T, K]."""
    rows = x.flatten(0, -2)
    products = (rows @ weight.t()).square() if gram is None else (rows @ gram) * rows
    return products.sum(-1, dtype=torch.float64).clamp_min(0)
