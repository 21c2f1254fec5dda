"""AWQ: scale up the weight columns that large activations meet, by a searched exponent.

Source: Lin et al. 2023, arXiv:2306.00978 sec. 3.2, and the authors' code (mean |X|, normalization,
        grid of 20).
Law:    s = mean|X|^r / sqrt(max min) for each input channel; (X / s)(s W) = X W. r is the one of
        0, 1/20 .. 19/20 with the least sum over the consumers of tr(E H E^T), E = Q(W s) / s - W and
        H = sum x x^T: the exact squared error of the products. Exponents are ranked on some rows; the
        best is then compared with r = 0, no scaling, on all rows: never worse than none on its
        calibration data.
        Scales fold as in smoothquant.py; where one producer row feeds several channels they share s.
Keeps:  the output.
Needs:  the sites' inputs, one group of consumers at a time (qcompile/calibration/layerwise_run.py).
Skips:  what SmoothQuant skips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.scale_folding import Consumers, Source, scale_source
from qcompile.analysis.sites import Site
from qcompile.analysis.tied_weights import tied_obstacle
from qcompile.calibration.hessian import hessian_of
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.equivalent.smoothquant import changed_by, excluded, fold_scale, shared_scale
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.passes.weights.gptq import GPTQ
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError

ROWS = 64
"""Rows of each weight that every exponent is tried on."""


@dataclass(frozen=True)
class AWQ(PassConfig):
    """The format to protect, and the search."""

    # Weight format of the quantizing pass behind it, to which the search rounds as well.
    weight: Format = Format("int4", "group", 128, "int")
    # Whether that pass searches the clip of each weight range; the search must round in the same way.
    clip: bool = False
    # How many exponents r are tried: 0, 1 / steps, .. The paper's grid of 20.
    steps: int = 20
    # Scale the inputs that a norm gives, by way of its gain. Off where a rotation needs unit gains.
    norms: bool = True
    # Scale the inputs that rows of a linear give: behind a gate, behind an attention.
    rows: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise RecipeError(f"AWQ: steps must be at least 2, got {self.steps}")


def awq_scale(mean: Tensor, exponent: float) -> Tensor:
    """mean|X| [K] -> s [K], float64, with max s times min s = 1; exponent 0 gives ones."""
    scale = mean.double().pow(exponent).clamp_min(1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def scaled_error(weight: Tensor, hessian: Tensor, scale: Tensor, form: Format, clip: bool = False) -> float:
    """tr(E H E^T) of one weight [N, K] rounded with its columns scaled by `scale` [K], H [K, K]."""
    scale = scale.float().to(weight.device)
    error = quantize_tensor(weight.float() * scale, form, clip=clip).dequantize() / scale - weight.float()
    return float(((error @ hessian.float()) * error).sum(dtype=torch.float64))


class RoundingSearch(Protocol):
    """A config whose search rounds weights as a quantizing pass behind it will."""

    @property
    def weight(self) -> Format:
        """The weight format."""

    @property
    def clip(self) -> bool:
        """Whether clips are searched."""


def rounding_conflicts(config: RoundingSearch, passes: Sequence[PassConfig]) -> list[str]:
    """Faults where the quantizing pass behind a search does not round as the search does."""
    return [
        f"{type(config).__name__} searches for weight={config.weight}, clip={config.clip}, and {type(p).__name__} "
        f"rounds with weight={p.weight}, clip={p.clip}. Fix: give both the same"
        for p in passes
        if isinstance(p, Quantize) and type(p) in (Quantize, GPTQ)
        if (p.weight, p.clip) != (config.weight, config.clip)
    ]


@rewrites(AWQ, Stage.SMOOTH, exact=True, needs=("batches",), conflicts=rounding_conflicts)
def awq(program: Program, config: AWQ, context: PassContext) -> PassReport:
    """Search and fold a scale for every group of consumers whose input can take one, in place."""
    report = PassReport("AWQ")
    norms, sites = context.facts.norms, context.facts.sites
    run = context.layerwise_run(program, shared=True)
    found: list[_Group] = []
    exponents: list[float] = []
    for consumers in context.track(context.facts.consumers, "AWQ"):
        label = consumers.sites[0].name
        source = tied_obstacle(consumers.sites) or scale_source(program, consumers, norms, sites)
        if isinstance(source, Obstacle):
            report.skip(label, source.reason, source.node)
        elif not (config.rows if source.norm is None else config.norms):
            report.skip(label, excluded(source))
        else:
            run.advance(consumers.sites[0].node)
            hessian = hessian_of(run, consumers.sites[0], context.ranks)
            is_own = len(found) % context.ranks.count == context.ranks.rank
            mean = _mean_absolute(run, consumers.sites[0], context.ranks)
            found.append(_Group(consumers, source, mean, hessian if is_own else None))
            del hessian
            if len(found) % context.ranks.count == 0:
                exponents += _searched(program, found[len(exponents) :], config, context.ranks)
    exponents += _searched(program, found[len(exponents) :], config, context.ranks)
    for group, exponent in zip(found, exponents, strict=True):  # after the run, which must compute what was not scaled
        consumers, source = group.consumers, group.source
        scale = _scale(group.mean, source, exponent)
        fold_scale(program, source, list(consumers.sites), scale)
        report.done.append(consumers.sites[0].name)
        report.changed |= changed_by(source, consumers)
    if exponents:
        report.notes.append(f"exponents {min(exponents):.2f} to {max(exponents):.2f}")
    report.notes += run.notes()
    return report


@dataclass
class _Group:
    """Consumers of one input, before their scale is folded.

    Attributes:
        consumers: the sites.
        source: what takes the scale.
        mean: mean |x| of the input, float64 [K].
        hessian: of the input, [K, K]; None when it was searched with, and on ranks that do not search.
    """

    consumers: Consumers
    source: Source
    mean: Tensor
    hessian: Tensor | None


def _searched(program: Program, groups: Sequence[_Group], config: AWQ, ranks: Ranks) -> list[float]:
    """The exponents of groups, one at most for each rank, which search side by side and tell each other."""
    exponents = torch.zeros(len(groups), dtype=torch.float64)
    for place, group in enumerate(groups):
        if group.hessian is not None:
            exponents[place], _ = _search(
                program, group.consumers.sites, group.source, group.hessian, group.mean, config
            )
            group.hessian = None
    ranks.add(exponents)
    found: list[float] = exponents.tolist()
    return found


def _mean_absolute(run: LayerwiseRun, site: Site, ranks: Ranks) -> Tensor:
    """mean |x| of a site's input over all tokens of all batches of all ranks, float64 [K]."""
    sums, rows = torch.zeros(site.K, dtype=torch.float64), 0
    for values in run.rows_of(site.input):
        x = values.float()
        sums += x.abs().sum(0).cpu()
        rows += len(x)
    count = torch.tensor(rows, dtype=torch.float64)
    for total in (sums, count):
        ranks.add(total)
    return sums / count


def _scale(mean: Tensor, source: Source, exponent: float) -> Tensor:
    """The scale [K] that an exponent gives, one for channels that share a row of the source."""
    scale = awq_scale(mean, exponent)
    return scale if source.site is None else shared_scale(scale, source.channels, source.site.N)[0]


def _search(
    program: Program, sites: tuple[Site, ...], source: Source, hessian: Tensor, mean: Tensor, config: AWQ
) -> tuple[float, Tensor]:
    """Try every exponent on some rows of each weight, then compare the best of them with 0 on all rows."""

    def scale_of(step: int) -> Tensor:
        return _scale(mean, source, step / config.steps)

    def error(step: int, rows: int | None) -> float:
        total = 0.0
        for site in sites:
            weight = program.weights[site.name]
            part = weight if rows is None else weight[:: max(1, len(weight) // rows)]
            total += scaled_error(part, hessian, scale_of(step), config.weight, config.clip) * len(weight) / len(part)
        return total

    best = min(range(config.steps), key=lambda step: error(step, ROWS))
    if best and error(best, None) > error(0, None):
        best = 0
    return best / config.steps, scale_of(best)
