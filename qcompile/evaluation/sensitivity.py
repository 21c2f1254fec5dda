"""The damage of each site in each format, and the best mix of formats under a budget.

Source: ZeroQuant-V2, arXiv:2303.08302 sec. 3 (one tensor at a time; classes of sensitivity).

One site at a time is quantized, all others stay float, and the damage is the divergence of the model's output. The
layerwise run (layerwise_run.py) computes what comes before the site once, so a site costs only what comes after it.
Choosing formats adds damages up, which is exact where they are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qcompile.analysis.sites import Site, find_sites
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.evaluation.plots import plot_file
from qcompile.ir.program import Program
from qcompile.numerics.divergence import kl_divergence, relative_squared_error
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

CLASSES = (0.005, 0.025)  # of perplexity: ZeroQuant-V2's 0.1 and 0.5 at its models' 20


@dataclass(frozen=True)
class SiteFormats:
    """The formats of one site: of its weight, and of its activation (None: float)."""

    weight: Format
    act: Format | None = None

    def __str__(self) -> str:
        return f"{self.weight} x {self.act or 'float'}"

    @staticmethod
    def parse(text: str) -> SiteFormats:
        """Read "int4/group128/zero" or "int8:int8/row" (weight:activation)."""
        weight, _, act = text.partition(":")
        return SiteFormats(Format.parse(weight), Format.parse(act) if act else None)


@dataclass(frozen=True)
class Damage:
    """One site in one format.

    Attributes:
        site: the weight's name.
        formats: of the site.
        nbytes: of the site's stored weight in them.
        kl: mean KL(float || quantized) per token, nats; for a model without logits the squared relative error of its
            output.
    """

    site: str
    formats: SiteFormats
    nbytes: int
    kl: float

    @property
    def sensitivity(self) -> int:
        """Class 1 (hardly), 2 or 3 (very sensitive), by the perplexity that the divergence costs."""
        return 1 + sum(torch.expm1(torch.tensor(self.kl)).item() > bound for bound in CLASSES)


def sensitivity(
    program: Program,
    batches: Iterable[Sequence[Any]],
    choices: Sequence[SiteFormats],
    *,
    logits: bool = True,
    progress: bool = True,
) -> list[Damage]:
    """Quantize each linear site by itself in each of several formats.

    Args:
        program: float.
        batches: flat inputs; some 500 tokens tell the sites apart. Padding does not count.
        choices: what to try.
        logits: whether the first output holds logits [.., V].
        progress: show a bar.

    Raises:
        ValueError: no batch, or no format.
    """
    batches = list(batches)
    if not batches or not choices:
        raise ValueError("sensitivity needs at least one batch and one format")
    measure = kl_divergence if logits else relative_squared_error
    float_outputs = [program(*batch)[0] for batch in batches]
    sites = [s for s in find_sites(program) if s.kind == "linear"]
    walk, found, output = LayerwiseRun(program, batches), [], program.outputs[0]
    for site in track(sites, "sensitivity", disable=not progress, transient=True):
        walk.advance(site.node)
        inputs = list(walk.values_of(site.input))
        for formats in choices:
            q = quantize_tensor(program.weights[site.name], formats.weight, clip=formats.weight.bits < 8)
            total = 0.0
            for index, (x, want) in enumerate(zip(inputs, float_outputs, strict=True)):
                got = walk.finish(index, site.node, _linear(program, site, x, q.dequantize(x.dtype), formats))
                got = got[0] if isinstance(got, (tuple, list)) else got
                own = walk.tokens[index]
                total += max(float(measure(own.select(output, want), own.select(output, got))), 0.0)
            found.append(Damage(site.name, formats, q.nbytes, total / len(batches)))
    return found


def _linear(program: Program, site: Site, x: Tensor, weight: Tensor, formats: SiteFormats) -> Tensor:
    bias = program.weight_name(site.bias)
    if formats.act is not None:
        x = quantize_tensor(x, formats.act).dequantize(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else program.weights[bias])


def mix(damages: Sequence[Damage], *, nbytes: int | None = None, kl: float | None = None) -> dict[str, SiteFormats]:
    """Formats for each site: the smallest everywhere, then the upgrades that reduce the damage most per byte.

    Args:
        damages: every site in every format.
        nbytes: one goal: a budget for the weights of all sites, in bytes.
        kl: the other goal: what the damages may add up to, in nats per token.

    Returns:
        The formats by the name of the site.

    Raises:
        ValueError: not exactly one goal, or a goal that no mix reaches, with the nearest.
    """
    if (nbytes is None) == (kl is None):
        raise ValueError("mix needs exactly one goal. Fix: give nbytes= or kl=")
    options: dict[str, list[Damage]] = {}
    for damage in damages:
        options.setdefault(damage.site, []).append(damage)
    chosen = {site: min(o, key=lambda d: (d.nbytes, d.kl)) for site, o in options.items()}
    total, loss = sum(d.nbytes for d in chosen.values()), sum(d.kl for d in chosen.values())
    if nbytes is not None and total > nbytes:
        raise ValueError(f"the smallest formats take {total / 1e6:.1f} MB, the budget is {nbytes / 1e6:.1f} MB")
    closed: set[tuple[str, str]] = set()
    while kl is None or loss > kl:
        steps = [
            ((now.kl - d.kl) / max(d.nbytes - now.nbytes, 1), d)
            for site, now in chosen.items()
            for d in options[site]
            if d.kl < now.kl and d.nbytes >= now.nbytes and (site, str(d.formats)) not in closed
        ]
        if not steps:
            break
        _, best = max(steps, key=lambda s: s[0])
        now = chosen[best.site]
        if nbytes is not None and total + best.nbytes - now.nbytes > nbytes:
            closed.add((best.site, str(best.formats)))  # too large; a smaller upgrade may still fit
            continue
        chosen[best.site] = best
        total, loss = total + best.nbytes - now.nbytes, loss + best.kl - now.kl
    if kl is not None and loss > kl:
        raise ValueError(f"the best mix of these formats still diverges by {loss:.4f}, the goal is {kl:.4f}")
    return {site: d.formats for site, d in chosen.items()}


def mixed_recipe(base: Recipe, chosen: dict[str, SiteFormats]) -> Recipe:
    """`base` with a rule for every site."""
    rules = [Rule(site, weight=formats.weight, act=formats.act) for site, formats in chosen.items()]
    return Recipe(f"{base.name}-mixed", base.passes, tuple(rules), f"mixed by sensitivity; {base.source}")


def table(damages: Sequence[Damage], worst: int = 20) -> Table:
    """The most damaged sites, and the sum over all sites, one column per choice of formats."""
    choices = list(dict.fromkeys(d.formats for d in damages))
    by_site: dict[str, dict[SiteFormats, Damage]] = {}
    for damage in damages:
        by_site.setdefault(damage.site, {})[damage.formats] = damage
    ranked = sorted(by_site.items(), key=lambda item: -max(d.kl for d in item[1].values()))
    found = Table("site", *map(str, choices), title="KL to float with one site quantized (class)")
    for name, row in ranked[:worst]:
        found.add_row(Text(name), *[f"{row[k].kl:.5f} ({row[k].sensitivity})" for k in choices])
    found.add_section()
    found.add_row(f"all {len(ranked)} sites, added up", *[f"{sum(r[k].kl for _, r in ranked):.4f}" for k in choices])
    return found


def plot(damages: Sequence[Damage], path: Path) -> None:
    """Draw the damage of every site in graph order, one line per format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with plot_file(path, (9, 4.5)) as axes:
        for formats in dict.fromkeys(d.formats for d in damages):
            values = [max(d.kl, 1e-7) for d in damages if d.formats == formats]
            axes.plot(range(len(values)), values, marker=".", markersize=4, linewidth=0.8, label=str(formats))
        axes.set(yscale="log", xlabel="site, in the order of the graph", ylabel="KL to float, nats per token")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
