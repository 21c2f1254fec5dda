"""What a quantizing pass found for sites that it solves together, and a place that keeps it for another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.numerics.qtensor import StoredParts


@dataclass(frozen=True)
class SolvedSites:
    """The codes of sites that were solved together.

    Attributes:
        parts: stored parts, site by site.
        fell_back: names of sites, or of experts of one, that are rounded to nearest instead.
        damage: ||(W - W^) x||^2 / ||W x||^2 over the calibration tokens: rounded to nearest, and as solved; None where
            no inputs were read.
    """

    parts: list[StoredParts]
    fell_back: list[str] = field(default_factory=list)
    damage: tuple[float, float] | None = None


class FinishedSites(Protocol):
    """Keeps solved sites where another run, and the other ranks of this one, find them.

    Attributes:
        ranks: the processes that share the run.
    """

    ranks: Ranks

    def has(self, sites: Sequence[str]) -> bool:
        """Whether an earlier run kept something for these sites; the same on all ranks."""

    def find(self, sites: Sequence[str]) -> SolvedSites:
        """What was kept for these sites, by whichever rank."""

    def add(self, sites: Sequence[str], solved: SolvedSites) -> None:
        """Keep it."""

    def keep_run(self, run: LayerwiseRun) -> None:
        """Keep where a layerwise run stands, from time to time."""

    def restore_run(self, run: LayerwiseRun) -> None:
        """Bring a run that has not begun to where an earlier one stood, if that was kept."""


def solve_each(
    finished: FinishedSites | None, work: Sequence[tuple[Sequence[str], Callable[[], SolvedSites]]]
) -> Iterator[SolvedSites]:
    """Solve groups of sites that do not depend on each other; each rank does some of them.

    Args:
        finished: keeps them; None: nothing is kept, and this process does all.
        work: names of sites, and what solves them.

    Yields:
        In order, what was solved now or by an earlier run.
    """
    if finished is None:
        for _, solve in work:
            yield solve()
        return
    ranks = finished.ranks
    if ranks.count == 1:
        for sites, solve in work:
            if not finished.has(sites):
                finished.add(sites, solve())
            yield finished.find(sites)
        return
    left = [(sites, solve) for sites, solve in work if not finished.has(sites)]
    for sites, solve in left[ranks.rank :: ranks.count]:
        finished.add(sites, solve())
    ranks.wait()
    for sites, _ in work:
        yield finished.find(sites)


def solve_together(
    finished: FinishedSites | None, sites: Sequence[str], owner: int, solve: Callable[[bool], SolvedSites | None]
) -> SolvedSites:
    """Solve a group of sites for which all ranks have gathered their inputs.

    Args:
        finished: keeps them; None: nothing is kept, and this process is alone.
        sites: names of sites.
        owner: the rank that solves.
        solve: gathers the inputs on every rank; told whether to solve, it returns what it found.

    Returns:
        What was solved now or by an earlier run.
    """
    if finished is not None and finished.has(sites):
        return finished.find(sites)
    is_owner = finished is None or finished.ranks.rank == owner
    solved = solve(is_owner)
    if finished is None:
        assert solved is not None
        return solved
    if solved is not None:
        finished.add(sites, solved)
    finished.ranks.wait()
    return finished.find(sites)
