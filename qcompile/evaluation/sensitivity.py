"""How much each site suffers in each format, and the best mix of formats under a budget.

Source: ZeroQuant-V2, arXiv:2303.08302 sec. 3 (one tensor at a time; classes of sensitivity).

One site at a time is quantized, all others stay float, and the damage is the divergence of the
model's output. The walk (layerwise_run.py) computes what comes before the site once, so a site costs only
what comes after it. Choosing formats adds damages up, which is exact where they are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from qcompile.analysis.sites import Site, find_sites
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.ir.program import Program
from qcompile.numerics.divergence import divergence, squared_error
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.recipe.recipe import Recipe, Rule

CLASSES = (0.005, 0.025)  # of perplexity: ZeroQuant-V2's 0.1 and 0.5 at its models' 20


@dataclass(frozen=True)
class Kind:
    """A weight format and an activation format (None: float), as one choice for a site."""

    weight: Format
    act: Format | None = None

    def __str__(self) -> str:
        return f"{self.weight} x {self.act or 'float'}"

    @staticmethod
    def parse(text: str) -> Kind:
        """Read "int4/group128/zero" or "int8:int8/row" (weight:activation)."""
        weight, _, act = text.partition(":")
        return Kind(Format.parse(weight), Format.parse(act) if act else None)


@dataclass(frozen=True)
class Damage:
    """One site in one format.

    Attributes:
        site: the weight's name. kind: the formats. nbytes: of the site's stored weight in them.
        kl: mean KL(float || quantized) for each token, nats; for a model without logits the
            squared relative error of its output.
    """

    site: str
    kind: Kind
    nbytes: int
    kl: float

    @property
    def sensitivity(self) -> int:
        """1 (hardly), 2 or 3 (very sensitive), by the perplexity that the divergence costs."""
        return 1 + sum(torch.expm1(torch.tensor(self.kl)).item() > bound for bound in CLASSES)


def sensitivity(
    program: Program,
    batches: Sequence[Sequence[Any]],
    kinds: Sequence[Kind],
    *,
    logits: bool = True,
    progress: bool = True,
) -> list[Damage]:
    """Quantize each linear site by itself in each of several formats.

    Args:
        program: float. batches: flat inputs; some 500 tokens tell the sites apart.
        kinds: the formats. logits: whether the first output holds logits [.., V].
        progress: show a bar.

    Raises:
        ValueError: no batch, or no format.
    """
    if not batches or not kinds:
        raise ValueError("sensitivity needs at least one batch and one format")
    measure = divergence if logits else squared_error
    wanted = [program(*batch)[0] for batch in batches]
    sites = [s for s in find_sites(program) if s.kind == "linear"]
    walk, found = LayerwiseRun(program, batches), []
    for site in track(sites, "sensitivity", disable=not progress, transient=True):
        walk.advance(site.node)
        inputs = list(walk.see(site.input))
        for kind in kinds:
            q = quantize_tensor(program.weights[site.name], kind.weight, clip=kind.weight.bits < 8)
            total = 0.0
            for index, (x, want) in enumerate(zip(inputs, wanted, strict=True)):
                got = walk.finish(index, site.node, _product(program, site, x, q.dequantize(x.dtype), kind))
                total += max(float(measure(want, got[0] if isinstance(got, (tuple, list)) else got)), 0.0)
            found.append(Damage(site.name, kind, q.nbytes, total / len(batches)))
    return found


def _product(program: Program, site: Site, x: Tensor, weight: Tensor, kind: Kind) -> Tensor:
    bias = program.weight_name(site.bias)
    if kind.act is not None:
        x = quantize_tensor(x, kind.act).dequantize(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else program.weights[bias])


def mix(damages: Sequence[Damage], *, nbytes: int | None = None, kl: float | None = None) -> dict[str, Kind]:
    """A format for each site: from the smallest everywhere, the upgrades that win most for a byte.

    Args:
        damages: every site in every format. nbytes: budget of all sites' weights; or
        kl: what the damages may add up to.

    Raises:
        ValueError: not exactly one goal, or a goal that no mix reaches, with the nearest.
    """
    if (nbytes is None) == (kl is None):
        raise ValueError("give one goal: nbytes= or kl=")
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
            if d.kl < now.kl and d.nbytes >= now.nbytes and (site, str(d.kind)) not in closed
        ]
        if not steps:
            break
        _, best = max(steps, key=lambda s: s[0])
        now = chosen[best.site]
        if nbytes is not None and total + best.nbytes - now.nbytes > nbytes:
            closed.add((best.site, str(best.kind)))  # too dear; a cheaper one may still fit
            continue
        chosen[best.site] = best
        total, loss = total + best.nbytes - now.nbytes, loss + best.kl - now.kl
    if kl is not None and loss > kl:
        raise ValueError(f"the best mix of these formats still diverges by {loss:.4f}, the goal is {kl:.4f}")
    return {site: d.kind for site, d in chosen.items()}


def mixed_recipe(base: Recipe, chosen: dict[str, Kind]) -> Recipe:
    """`base` with a rule for every site."""
    rules = [Rule(site, weight=kind.weight, act=kind.act) for site, kind in chosen.items()]
    return Recipe(f"{base.name}-mixed", base.passes, tuple(rules), f"mixed by sensitivity; {base.source}")


def table(damages: Sequence[Damage], worst: int = 20) -> Table:
    """The most damaged sites, and the sum over all sites, for each format."""
    kinds = list(dict.fromkeys(d.kind for d in damages))
    by_site: dict[str, dict[Kind, Damage]] = {}
    for damage in damages:
        by_site.setdefault(damage.site, {})[damage.kind] = damage
    ranked = sorted(by_site.items(), key=lambda item: -max(d.kl for d in item[1].values()))
    found = Table("site", *[f"{kind}" for kind in kinds], title="KL to float with one site quantized (class)")
    for name, row in ranked[:worst]:
        found.add_row(name, *[f"{row[k].kl:.5f} ({row[k].sensitivity})" for k in kinds])
    found.add_section()
    found.add_row(f"all {len(ranked)} sites, added up", *[f"{sum(r[k].kl for _, r in ranked):.4f}" for k in kinds])
    return found


def plot(damages: Sequence[Damage], path: Path) -> None:
    """Damage of every site in graph order, one line for each format. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5))
    for kind in dict.fromkeys(d.kind for d in damages):
        values = [max(d.kl, 1e-7) for d in damages if d.kind == kind]
        axis.plot(range(len(values)), values, marker=".", markersize=4, linewidth=0.8, label=str(kind))
    axis.set(yscale="log", xlabel="site, in the order of the graph", ylabel="KL to float, nats a token")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
