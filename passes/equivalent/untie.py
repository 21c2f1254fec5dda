"""Untie: give a site that shares its weight with a table a weight of its own.

Source: the pitfall of rotating tied embeddings (QuaRot code issues); no paper.
Law:    a copy of W is W.
Keeps:  the output, exactly.
Needs:  nothing.
Skips:  weights that several sites share (a layer that is used twice must stay one matrix), and sites that no module is
        (in place, a copy would have no attribute path).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qcompile.analysis.sites import Site
from qcompile.ir.node_meta import MODULE, NO_MODULE
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
    """Give each such site a weight of its own, under the attribute path that its module has for it."""
    report = PassReport("Untie")
    sites = context.facts.sites
    for site in sites:
        readers = [user for user in site.weight.users if user is not site.node]
        if not readers or site.kind != "linear":
            continue
        others = program.aliases.get(site.name, [])
        if any(other.weight is site.weight and other is not site for other in sites):
            report.skip(site.name, "several sites share this weight: one matrix must serve them all")
        elif NO_MODULE in site.node.meta:
            report.skip(site.name, f"no module could hold a copy ({site.node.meta[NO_MODULE]})")
        elif _is_named_by_site(site):
            name = next((path for path in others if _reads_as(readers, path)), None)
            if name is None:
                report.skip(site.name, "what else reads the weight has no attribute path of its own")
                continue
            others.remove(name)
            table = program.add_weight(name, program.weights[site.name])
            for reader in readers:
                reader.replace_input_with(site.weight, table)
            program.aliases[name], program.aliases[site.name] = others, []
            report.done.append(f"{name} from {site.name}")
        else:
            module = site.node.meta.get(MODULE)
            own = [path for path in others if module is None or path.rpartition(".")[0] == module]
            name = own[0] if own else f"{site.name}.untied"
            program.aliases[site.name] = [path for path in others if path != name]
            copy = program.add_weight(name, program.weights[site.name])
            site.node.replace_input_with(site.weight, copy)
            report.renamed[name] = site.name
            report.done.append(f"{name} from {site.name}")
    return report


def _is_named_by_site(site: Site) -> bool:
    """Whether the weight's name is the path of the site's own module, and not of the table."""
    return site.node.meta.get(MODULE) == site.name.rpartition(".")[0]


def _reads_as(readers: list[fx.Node], path: str) -> bool:
    """Whether a reader lies in the module that has the weight under this attribute path."""
    parent = path.rpartition(".")[0]
    for reader in readers:
        stack = reader.meta.get("nn_module_stack") or {"": ("", None)}
        place = str(list(stack.values())[-1][0])
        if place == parent or place.endswith(f".{parent}"):
            return True
    return False
