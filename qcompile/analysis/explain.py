"""What the analyses find in a model: sites, siblings, where scales fold, which bases can be rotated."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qcompile.analysis.facts import Facts
from qcompile.analysis.obstacle import Obstacle, ObstacleKind
from qcompile.analysis.scale_folding import Source, scale_source
from qcompile.ir.program import Program


def where(source: Source | Obstacle) -> str:
    """One line on where a smoothing scale folds, or why nowhere."""
    if isinstance(source, Obstacle):
        return f"no: {source}"
    if source.norm is not None:
        return f"gain of {source.norm.output.name}"
    assert source.site is not None
    heads = f", heads of {source.head}" if source.head else ""
    return f"rows of {source.site.name}{heads}"


def explain(program: Program) -> RenderableType:
    """Tables of sites and residual streams, for a terminal."""
    facts = Facts(program)
    sites, norms = facts.sites, facts.norms
    scales = {s.name: where(scale_source(program, g, norms, sites)) for g in facts.consumers for s in g.sites}
    site_table = Table("site", "N x K", "kind", "siblings", "smoothing scale folds into", "shared with", title="Sites")
    for site in sites:
        site_table.add_row(
            Text(site.name),
            f"{site.N} x {site.K}",
            site.kind,
            str(len(site.siblings)),
            Text(scales.get(site.name, "no: expert stack")),
            Text(", ".join(site.shared_with)),
        )
    columns = ("basis", "channels", "producers", "tables", "consumers", "norms", "state")
    stream_table = Table(*columns, title="Residual streams")
    for stream in facts.streams:
        gains = [o for o in stream.obstacles if o.kind is ObstacleKind.GAIN]
        others = [o for o in stream.obstacles if o.kind is not ObstacleKind.GAIN]
        state = "closed" if stream.closed else "open: " + "; ".join(map(str, others[:3]))
        if gains and not others:
            state = f"closed once FoldNorm has folded {len(gains)} gains"
        stream_table.add_row(
            Text(stream.norms[0].input.name),
            str(stream.size),
            str(len(stream.producers)),
            str(len(stream.tables)),
            str(len(stream.consumers)),
            str(len(stream.norms)),
            Text(state),
        )
    tied = [f"{name} = {', '.join(others)}" for name, others in program.aliases.items()]
    lines = Text("Tied weights: " + ("; ".join(tied) or "none") + f"\nNorms: {len(norms)}")
    return Group(site_table, stream_table, lines)
