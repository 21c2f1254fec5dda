"""Tied weights: why a pass must not rewrite a weight, or a bias, that something else reads too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.sites import Site
from qcompile.ir.program import Program

_FIX = "Fix: Untie() before this pass"


def tied_obstacle(sites: Iterable[Site]) -> Obstacle | None:
    """The first site whose weight or bias something else reads too, or None.

    Args:
        sites: the sites whose weights a pass would rewrite.
    """
    for site in sites:
        if site.shared_with:
            weight = any(user.name == site.shared_with[0] for user in site.weight.users)
            what, fix = ("weight", f". {_FIX}") if weight else ("bias", "")
            return Obstacle(site.node.name, f"the {what} of {site.name} is tied to {site.shared_with[0]}{fix}")
    return None


def tied_table_obstacle(program: Program, tables: Iterable[fx.Node], sites: Iterable[Site]) -> Obstacle | None:
    """The first table that is the weight of a site too, or None.

    Args:
        program: where the tables are.
        tables: placeholders of embeddings and of added parameters, which a pass would rewrite.
        sites: all sites of the program.
    """
    products = {site.node for site in sites}
    for table in tables:
        if any(user in products for user in table.users):
            return Obstacle(table.name, f"the table {program.weight_name(table)} is a linear's weight too. {_FIX}")
    return None
