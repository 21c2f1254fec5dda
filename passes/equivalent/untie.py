"""Untie: give a site that shares its weight with a table a weight of its own.

Source: the pitfall of rotating tied embeddings (QuaRot code issues); no paper.
Law:    a copy of W is W.
Keeps:  the output, exactly.
Needs:  nothing.
Skips:  weights that several sites share (a layer that is used twice must stay one matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.ir.program import Program
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class Untie(PassConfig):
    """Copy the weight of every site whose weight something else reads too."""


@rewrites(Untie, Stage.UNTIE, exact=True)
def untie(program: Program, config: Untie, context: PassContext) -> PassReport:
    """Give each such site its own copy, named by the weight's other attribute path if it has one."""
    report = PassReport("Untie")
    sites = context.facts.sites
    for site in sites:
        if not site.shared_with or site.kind != "linear":
            continue
        if any(other.weight is site.weight and other is not site for other in sites):
            report.skip(site.name, "several sites share this weight: one matrix must serve them all")
            continue
        others = program.aliases.get(site.name, [])
        name = others.pop(0) if others else f"{site.name}.untied"
        own = program.add_weight(name, program.weights[site.name])
        site.node.replace_input_with(site.weight, own)
        report.renamed[name] = site.name
        report.done.append(f"{name} from {site.name}")
    return report
