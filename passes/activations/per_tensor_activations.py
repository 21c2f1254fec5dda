"""PerTensorActivations: a per-tensor scale for activations, at the sites whose tokens are about equally large.

A per-token scale divides every row before a product and multiplies it after; a per-tensor scale is a scalar that the
product takes by itself. Most inputs are outputs of norms, whose tokens are alike; massive activations of a few tokens
shrink all others' codes at the rest.

Source: ours; massive activations are Sun et al. 2024, arXiv:2402.17762.
Law:    a site is changed only if a per-tensor scale gives its products, over the calibration text, at most `most` times
        the error of per-token scales. The error is the root mean square over tokens of |(q(x) - x) W^T| / |x W^T|:
        every token counts alike, or the massive ones, which lose nothing, would hide what the others lose. Sites that
        read the same value are judged together: they can still be multiplied as one.
Keeps:  the graph; the formats go into the rules of the context, for the quantizing pass behind it. The rounding of a
        token then depends on the tokens beside it in the same call.
Needs:  the sites' inputs, and a quantizing pass behind it whose activations are the same with per-token scales.
Skips:  sites with a larger error; sites with a rule for their activations; what chooses experts; the logits without
        `lm_head`.
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
    """A per-tensor scale where the error is at most `most` times that of per-token scales."""

    # Format of the activations of those sites: an integer format per tensor.
    act: Format = Format("int8", "tensor")
    # Whether the sites that give the logits are judged too. Off: they keep the recipe's format.
    lm_head: bool = False
    # The largest error of a per-tensor scale, in errors of per-token scales; at least 1. Outputs of norms are below
    # 1.6, inputs with massive activations far above.
    most: float = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act.per != "tensor" or self.act.is_float:
            raise RecipeError(f"PerTensorActivations: act must be an integer format per tensor, got {self.act}")
        if self.most < 1:
            raise RecipeError(f"PerTensorActivations: most must be at least 1, got {self.most}")


def _conflicts(config: PerTensorActivations, passes: Sequence[PassConfig]) -> list[str]:
    quantizer = next((other for other in passes[passes.index(config) :] if isinstance(other, Quantize)), None)
    if quantizer is None:
        return ["PerTensorActivations chooses formats for the quantizing pass behind it. Fix: add one"]
    per_token, name = dataclasses.replace(config.act, per="row"), type(quantizer).__name__
    faults = []
    if quantizer.act != per_token:
        faults.append(f"PerTensorActivations({config.act}) needs act={per_token} in {name}, which has {quantizer.act}")
    if config.lm_head and quantizer.lm_head is not None and quantizer.lm_head_act != per_token:
        faults.append(
            f"PerTensorActivations(lm_head=True) needs lm_head_act={per_token} in {name}, "
            f"which has {quantizer.lm_head_act}. Fix: give it, or lm_head=False"
        )
    return faults


@rewrites(PerTensorActivations, Stage.ACTIVATIONS, exact=False, needs=("batches",), conflicts=_conflicts)
def per_tensor_activations(program: Program, config: PerTensorActivations, context: PassContext) -> PassReport:
    """Write the formats of the chosen sites into the rules of the context."""
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
        ratio = error_ratio(list(run.rows_of(members[0].input)), weight, config.act)
        for site in members:  # the scale of a weight that is called at several places must fit at all of them
            found[site.name] = max(found.get(site.name, 0.0), ratio)
    for name, ratio in found.items():
        if not ratio <= config.most:
            report.skip(name, f"a per-tensor scale has {ratio:.1f} times the error of per-token scales")
            continue
        rule = context.rules.get(name)
        context.rules[name] = dataclasses.replace(rule, act=config.act) if rule else Rule(name, act=config.act)
        report.done.append(name)
    report.notes += run.notes()
    chosen = f"{len(report.done)} of {len(found)} sites get a per-tensor scale"
    report.notes.append(f"{chosen} ({', '.join(_ranges(found, config.most))})")
    return report


def _ranges(found: dict[str, float], most: float) -> list[str]:
    """The errors of these, and of the others."""
    parts = [sorted(t for t in found.values() if (t <= most) == below) for below in (True, False)]
    named = zip(("these", "others"), parts, strict=True)
    return [f"{who} {part[0]:.2f} to {part[-1]:.2f} times the error" for who, part in named if part]


def error_ratio(inputs: list[Tensor], weight: Tensor, act: Format) -> float:
    """The error of x W^T with a per-tensor scale, divided by that with per-token scales.

    Args:
        inputs: x of each batch, [.., T, K].
        weight: [N, K].
        act: the per-tensor format.
    """
    per_token = dataclasses.replace(act, per="row")
    gram = weight.t() @ weight if weight.shape[0] > weight.shape[1] else None  # |x W^T|^2 = x W^T W x^T
    sums = [0.0, 0.0]
    for x in inputs:
        size = _product_sizes(x.float(), weight, gram)
        for index, form in enumerate((act, per_token)):
            moved = _product_sizes(as_rounded(x, form).float() - x.float(), weight, gram)
            sums[index] += float((moved[size > 0] / size[size > 0]).sum())
    return (sums[0] / sums[1]) ** 0.5 if sums[1] else (1.0 if not sums[0] else float("inf"))


def _product_sizes(x: Tensor, weight: Tensor, gram: Tensor | None) -> Tensor:
    """|x W^T|^2 of every token, float64, without [T, N] where that is more than [T, K]."""
    rows = x.reshape(-1, x.shape[-1])
    products = (rows @ weight.t()).square() if gram is None else (rows @ gram) * rows
    return products.sum(-1, dtype=torch.float64).clamp_min(0)
