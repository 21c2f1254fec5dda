"""What qcompile sees in a model: sites, siblings, where scales fold, which bases can be turned."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qcompile.analysis.norms import find_norms
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.residual_stream import residual_streams
from qcompile.analysis.scale_folding import Source, groups_of_consumers, scale_source
from qcompile.analysis.sites import find_sites
from qcompile.ir.program import Program


def where(source: Source | Obstacle) -> str:
    """One line on where a smoothing scale folds, or why nowhere."""
    if isinstance(source, Obstacle):
        return f"no: {source}"
    if source.norm is not None:
        return f"gain of {source.norm.output.name}"
    assert source.site is not None
    config = f", heads of {source.head}" if source.attention else ""
    return f"rows of {source.site.name}{config}"


def explain(program: Program) -> RenderableType:
    """Tables of sites and flows, for a terminal."""
    sites, norms = find_sites(program), find_norms(program)
    groups = groups_of_consumers(sites)
    scales = {s.name: where(scale_source(program, g, norms, sites)) for g in groups for s in g.sites}
    site_table = Table("site", "N x K", "kind", "siblings", "smoothing scale folds into", "shared with", title="Sites")
    for site in sites:
        site_table.add_row(
            site.name,
            f"{site.N} x {site.K}",
            site.kind,
            str(len(site.siblings)),
            scales.get(site.name, "no: expert stack"),
            ", ".join(site.shared_with),
        )
    flow_table = Table("basis", "channels", "writers", "tables", "readers", "norms", "state", title="Rotation flows")
    for flow in residual_streams(program):
        gains = [o for o in flow.obstacles if "gain" in o.reason]
        others = [o for o in flow.obstacles if "gain" not in o.reason]
        state = "closed" if flow.closed else "open: " + "; ".join(map(str, others[:3]))
        if gains and not others:
            state = f"closed once fold_norm has folded {len(gains)} gains"
        flow_table.add_row(
            flow.norms[0].input.name,
            str(flow.size),
            str(len(flow.producers)),
            str(len(flow.tables)),
            str(len(flow.consumers)),
            str(len(flow.norms)),
            state,
        )
    tied = [f"{name} = {', '.join(others)}" for name, others in program.aliases.items()]
    lines = Text("Tied weights: " + ("; ".join(tied) or "none") + f"\nNorms: {len(norms)}")
    return Group(site_table, flow_table, lines)
