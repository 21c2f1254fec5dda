"""SmoothQuant: move activation outliers into the weights.

Source: Xiao et al. 2022, arXiv:2211.10438, eq. 4.
        DGQ's percentile clip: arXiv:2310.04836 sec. 3.3 (baseline's rank from the authors' code).
Law:    s = max|X|^a / max|W|^(1-a) for each input channel;  (X / s)(s W) = X W.
        With `percentile` p instead s = max(1, max|X| / a) with a the largest |X| of all but the
        top share p of the channels: only outlier channels are touched.
        1/s folds into the gain of a norm, or into the rows of the linear whose output reaches the
        site through operations that carry a positive factor (see qcompile/analysis/scale_folding.py). Where one
        producer channel feeds several (grouped-query attention), they share the largest s.
Keeps:  the output; computed in float64, cast once.
Needs:  absmax of the input, [K].
Skips:  sites whose input does not come from a norm gain or from linear rows, tied weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.scale_folding import Consumers, Source, scale_source
from qcompile.analysis.sites import Site
from qcompile.analysis.tied_weights import tied_obstacle
from qcompile.ir.program import Program
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class SmoothQuant(PassConfig):
    """How much of the difficulty moves from the activations into the weights."""

    # The paper's migration strength, 0 to 1: at 0 all outliers stay in X, at 1 all move to W.
    alpha: float = 0.5
    # Smooth the inputs that a norm gives, by way of its gain. Off where a rotation needs unit gains.
    norms: bool = True
    # Smooth the inputs that rows of a linear give: behind a gate, behind an attention.
    rows: bool = True
    # DGQ's variant: the share of channels, 0 to 1, that is brought down to the others (0.005); alpha is not used then.
    # None: the paper's scale for every channel.
    percentile: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"SmoothQuant: alpha must be between 0 and 1, got {self.alpha}")
        if self.percentile is not None and not 0 < self.percentile < 1:
            raise RecipeError(f"SmoothQuant: percentile is a share between 0 and 1, got {self.percentile}")


def smoothing_scale(act: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """max|X| [K] and max|W| [K] -> s [K], float64 and positive; dead channels get 1."""
    act, weight = act.double(), weight.double()
    scale = act.clamp_min(1e-5) ** alpha / weight.clamp_min(1e-5) ** (1 - alpha)
    return torch.where((act > 0) & (weight > 0), scale, torch.ones_like(scale)).clamp_min(1e-5)


def clip_scale(act: Tensor, share: float) -> Tensor:
    """max|X| [K] -> s [K], float64: above 1 only for the top share of channels."""
    ranked = act.double().sort(descending=True).values
    baseline = ranked[min(int(share * len(act) + 1.5), len(act) - 1)]
    return (act.double() / baseline).clamp_min(1) if baseline > 0 else torch.ones_like(ranked)


def shared_scale(scale: Tensor, channels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Make s equal where one producer row feeds several channels.

    Args:
        scale: [K] of each channel.
        channels: [K] the producer row behind each channel, int64.
        rows: N of the producer.

    Returns:
        s for each channel, [K], and s for each producer row, [rows] (1 where none is fed).
    """
    by_row = torch.zeros(rows, dtype=scale.dtype).scatter_reduce(0, channels, scale, "amax")
    by_row[by_row == 0] = 1
    return by_row[channels], by_row


@rewrites(SmoothQuant, Stage.SMOOTH, exact=True, needs=("absmax",))
def smoothquant(program: Program, config: SmoothQuant, context: PassContext) -> PassReport:
    """Smooth every group of sites whose input can take the scale, in place."""
    report = PassReport("SmoothQuant")
    norms, sites = context.facts.norms, context.facts.sites
    for consumers in context.facts.consumers:
        label = consumers.sites[0].name
        source = tied_obstacle(consumers.sites) or scale_source(program, consumers, norms, sites)
        if isinstance(source, Obstacle):
            report.skip(label, source.reason, source.node)
        elif not (config.rows if source.norm is None else config.norms):
            report.skip(label, excluded(source))
        else:
            act = context.statistics.absmax[consumers.root.name]
            if config.percentile is not None:
                scale = clip_scale(act, config.percentile)
            else:
                weight = torch.stack([_columns_absmax(program, s) for s in consumers.sites]).amax(0)
                scale = smoothing_scale(act, weight, config.alpha)
            fold_scale(program, source, list(consumers.sites), scale)
            report.done.append(label)
            report.changed |= changed_by(source, consumers)
    return report


def excluded(source: Source) -> str:
    """The reason to skip an input of a kind that the config excludes."""
    return f"its input comes from {'linear rows, and rows' if source.norm is None else 'a norm, and norms'}=False"


def changed_by(source: Source, consumers: Consumers) -> set[str]:
    """Names of the nodes whose values a fold changes on purpose: from the source to the consumers."""
    nodes = {n.name for n in (*source.path, *consumers.values)}
    if source.norm is not None:
        return nodes | {n.name for n in source.norm.inner}
    assert source.site is not None
    return nodes | {source.site.node.name}


def fold_scale(program: Program, source: Source, sites: list[Site], scale: Tensor) -> None:
    """Divide the channels of a value by `scale` [K] at its source, multiply the consumers' columns."""
    if source.norm is not None:
        gain = source.norm.gain_value(program)
        source.norm.set_gain(program, gain / scale)
        bias = program.weight_name(source.norm.bias)
        if bias is not None:
            old = program.weights[bias]
            program.weights[bias] = (old.double() / scale.to(old.device)).to(old.dtype)
    else:
        producer = source.site
        assert producer is not None
        scale, by_row = shared_scale(scale, source.channels, producer.N)
        for name in filter(None, (producer.name, program.weight_name(producer.bias))):
            old = program.weights[name].double()
            factor = by_row[:, None] if old.ndim == 2 else by_row
            program.weights[name] = (old / factor.to(old.device)).to(program.weights[name].dtype)
    for site in sites:
        old = program.weights[site.name]
        program.weights[site.name] = (old.double() * scale.to(old.device)).to(old.dtype)


def _columns_absmax(program: Program, site: Site) -> Tensor:
    weight = program.weights[site.name]
    return torch.maximum(weight.amax(0), -weight.amin(0)).double().cpu()
