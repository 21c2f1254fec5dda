"""FixedPoint: linears and convolutions train in 4-bit integers, forward and backward.

Source: arXiv:2407.12637, and the authors' code (cvlab-yonsei/LBT @84ab71a).
Law:    the product and both gradients are those of rounded operands and one rounded gradient, sums of integers; see
        ir/fixed_point_gradients.py, numerics/gradient_interval.py and numerics/fixed_point_operand.py.
Keeps:  nothing exactly: weights and activations are rounded.
Needs:  nothing; with batches the range of activations starts from them, which learned ranges demand.
Skips:  the first and the last product, found by dataflow; weights that something else reads too, that are computed, or
        that need no gradient; stacks of experts; transposed and three-dimensional convolutions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.conv_sites import ConvSite, find_conv_sites
from qcompile.analysis.network_ends import is_first, is_last
from qcompile.analysis.nonnegative import is_nonnegative
from qcompile.analysis.other_products import other_products
from qcompile.analysis.sites import Site
from qcompile.ir.aten_ops import CONVOLUTIONS
from qcompile.ir.node_meta import MODULE, NO_MODULE, SITE
from qcompile.ir.op_calls import FixedPointConvCall, FixedPointLinearCall
from qcompile.ir.program import Program
from qcompile.numerics.fixed_point_format import FixedPointFormat, GradientRounding, Interval, Ranges
from qcompile.numerics.fixed_point_operand import LEAST_CLIP, batch_range
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError

AnySite = Site | ConvSite
_STREAMS = 1_000_003  # between the seeds: a run has fewer sites


@dataclass(frozen=True)
class FixedPoint(PassConfig):
    """Train all linears and convolutions but the first and the last in fixed point."""

    # Bits of a weight's code.
    weight_bits: int = 4
    # Bits of an activation's code; behind a ReLU all of them are above zero.
    act_bits: int = 4
    # Bits of a gradient's code.
    gradient_bits: int = 4
    # The share of gradients beyond the clip is alpha / (2^b - 1). Tune it: 0.001 and 0.1 gain little or nothing.
    alpha: float = 1e-2
    # How far the clip of gradients moves in one step.
    beta: float = 1e-3
    # How that clip is chosen: by the paper's step, by the quantile that it settles at, the maximum, or a search.
    interval: Interval = "paper"
    # Clip of weights and activations: three sigma of each batch, learned parameters, or the maximum.
    ranges: Ranges = "sigma"
    # How gradients are rounded.
    rounding: GradientRounding = "stochastic"
    # Codes of activations have no sign where evaluation gives none below zero; training then refuses such values.
    drop_signs: bool = True
    # Keep the products float that read the model's input.
    keep_first: bool = True
    # Keep the products float that give the model's output.
    keep_last: bool = True
    # Of the random values of stochastic rounding.
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.format_of(0, signed=True)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"FixedPoint: {error}") from error

    def format_of(self, index: int, *, signed: bool, site: str = "") -> FixedPointFormat:
        """The format of one site, with random values of its own."""
        return FixedPointFormat(
            self.weight_bits, self.act_bits, self.gradient_bits, signed, self.ranges, self.interval, self.rounding,
            self.alpha, self.beta, self.seed * _STREAMS + index, site,
        )  # fmt: skip


@rewrites(
    FixedPoint,
    Stage.QUANTIZE,
    exact=False,
    trains=True,
    needs=lambda config: ("batches",) if config.ranges == "learned" else (),
)
def fixed_point(program: Program, config: FixedPoint, context: PassContext) -> PassReport:
    """Replace the products by ones that train, in place.

    Raises:
        RecipeError: a rule with formats, weights or inputs that are not finite, or no site is left.
    """
    report = PassReport("FixedPoint")
    convolutions = find_conv_sites(program)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    sites: list[AnySite] = sorted([*context.facts.sites, *convolutions], key=lambda site: order[site.node])
    chosen = [site for site in sites if _is_chosen(site, sites, config, context, report)]
    for other in other_products(program, {site.node for site in sites}):
        if other.node.target in CONVOLUTIONS:
            reason = "its weight is computed, or it is no convolution of one or two dimensions with equal margins"
            context.skip(report, other.name, reason, other.node.name)
    bad = [site.name for site in chosen if not bool(torch.isfinite(program.weights[site.name]).all())]
    if bad:
        raise RecipeError(f"FixedPoint: NaN or Inf in the weights {', '.join(bad[:8])}. Fix: load the model again")
    ranges = _observed_ranges(program, context, chosen, config)
    nonnegative: dict[object, bool] = {}
    unsigned = {site.node: config.drop_signs and is_nonnegative(site.input, nonnegative) for site in chosen}
    names = list(dict.fromkeys(site.name for site in chosen))
    # A module that is called more than once has one format: without a sign only where no call needs one.
    signed = {name: not all(unsigned[site.node] for site in chosen if site.name == name) for name in names}
    for site in chosen:
        form = config.format_of(names.index(site.name), signed=signed[site.name], site=site.name)
        _insert(program, site, form, ranges.get(site.name, torch.zeros(())), context)
    report.done += names
    if not names:
        reasons = "; ".join(str(item) for item in report.skipped[:8]) or "the model has no linear and no convolution"
        raise RecipeError(
            f"FixedPoint trains no weight: {reasons}. Fix: FixedPoint(keep_first=False, keep_last=False), where those "
            "are all"
        )
    count = sum(not value for value in signed.values())
    report.notes.append(f"{count} of {len(names)} sites read values that are never negative: codes without a sign")
    return report


def _is_chosen(
    site: AnySite, sites: Sequence[AnySite], config: FixedPoint, context: PassContext, report: PassReport
) -> bool:
    rule = context.rules.get(site.name)
    if rule is not None and (rule.weight or rule.act):
        raise RecipeError(
            f"rule {rule.match!r} gives formats, and FixedPoint has bits for all sites. Fix: keep=True, or drop it"
        )
    same = [other for other in sites if other.weight is site.weight]
    module = site.node.meta.get(MODULE)
    others = set(site.weight.users) - {other.node for other in same if other.node.meta.get(MODULE) == module}
    obstacle = f"kept float by the rule {rule.match!r}" if rule is not None and rule.keep else None
    if obstacle is None and isinstance(site, Site) and site.kind != "linear":
        obstacle = "a stack of experts is trained as it is"
    if obstacle is None and module is None:
        why = site.node.meta.get(NO_MODULE, "its weight is of no module")
        obstacle = f"no module computes just this product ({why})"
    if obstacle is None and others:
        obstacle = f"its weight is tied: {min(node.name for node in others)} reads it too"
    if obstacle is None and config.keep_first and any(is_first(other.node) for other in same):
        obstacle = "it is the first product (keep_first)"
    if obstacle is None and config.keep_last and any(is_last(other.node) for other in same):
        obstacle = "it is the last product (keep_last)"
    if obstacle is None:  # last: a caller's reason may be one that an option lifts, which the others would still hold
        obstacle = context.keep_float.get(site.name)
    if obstacle is not None:
        context.skip(report, site.name, obstacle, site.node.name)
    return obstacle is None


def _observed_ranges(
    program: Program, context: PassContext, sites: Sequence[AnySite], config: FixedPoint
) -> dict[str, Tensor]:
    """Name of a site -> the mean range of its input over the calibration batches, float32 []; empty without them."""
    if context.batches is None or not sites:
        return {}
    totals: dict[str, list[Tensor]] = {}
    readers: dict[fx.Node, list[AnySite]] = {}
    for site in sites:
        readers.setdefault(site.input, []).append(site)
    ranges = "sigma" if config.ranges == "learned" else config.ranges
    known: dict[object, bool] = {}

    def observe(node: fx.Node, value: Tensor) -> None:
        found = batch_range(value, ranges, not (config.drop_signs and is_nonnegative(node, known)))
        for site in readers[node]:
            totals.setdefault(site.name, []).append(found)

    for batch in context.track(list(context.data()), "ranges of activations"):
        program.watch(readers, batch, observe)
    means = {name: torch.stack(found).mean() for name, found in totals.items()}
    bad = [name for name, mean in means.items() if not bool(torch.isfinite(mean))]
    if bad:
        raise RecipeError(f"FixedPoint: the inputs of {', '.join(bad[:8])} are not finite. Fix: check the batches")
    return means


def _insert(program: Program, site: AnySite, form: FixedPointFormat, act_range: Tensor, context: PassContext) -> None:
    """One product; a module that is called again reads what was added for its first call."""
    learned = form.ranges == "learned"
    sigma = (3 * program.weights[site.name].float().std(correction=0)).clamp_min(LEAST_CLIP)
    tensors = {"act_range": act_range, "gamma": torch.zeros(()), "counter": torch.zeros((), dtype=torch.int64)}
    tensors |= {"act_clip": act_range.clamp_min(LEAST_CLIP), "weight_clip": sigma} if learned else {}
    device = program.weights[site.name].device
    parts: dict[str, fx.Node] = {}
    for part, tensor in tensors.items():
        name = f"{site.name}.{part}"
        is_new = name not in program.weights
        parts[part] = program.add_weight(name, tensor.to(device)) if is_new else program.node_of(name)
    fields: dict[str, Any] = dict(
        x=site.node.args[0],  # as it is now: the product before may have been replaced
        weight=site.weight, bias=site.bias, act_range=parts["act_range"], gamma=parts["gamma"],
        counter=parts["counter"], act_clip=parts.get("act_clip"), weight_clip=parts.get("weight_clip"),
        format=str(form), training=False, dtype=site.node.meta["val"].dtype,
    )  # fmt: skip
    call = FixedPointLinearCall(**fields) if isinstance(site, Site) else _conv_call(site, fields)
    product = call.insert(program, before=site.node)
    product.meta.update({MODULE: site.node.meta[MODULE], SITE: site.name})
    out = program.insert(operator.getitem, (product, 0), before=site.node)
    program.replace(site.node, out)
    if site.name in context.sites:
        told = context.sites[site.name]
        told.weight, told.act, told.reason = f"int{form.weight_bits}/tensor", f"int{form.act_bits}/tensor", ""


def _conv_call(site: ConvSite, fields: dict[str, Any]) -> FixedPointConvCall:
    stride, padding, dilation = (list(sizes) for sizes in (site.stride, site.padding, site.dilation))
    return FixedPointConvCall(**fields, stride=stride, padding=padding, dilation=dilation, groups=site.groups)
