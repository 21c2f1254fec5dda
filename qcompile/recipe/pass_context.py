"""What every pass is given beside the program and its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rich.progress import track

from qcompile.analysis.facts import Facts
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.calibration.statistics import CalibrationError, Statistics
from qcompile.ir.program import Program
from qcompile.memory.spilled_weights import SpillFolder
from qcompile.recipe.report import KVConstants, PassReport, SiteReport
from qcompile.recipe.rule import Rule
from qcompile.recipe.solved_sites import FinishedSites

Batches = Callable[[], Iterable[Sequence[Any]]]
"""Gives a fresh iterator of a program's flat inputs, one batch after another."""

T = TypeVar("T")


@dataclass
class PassContext:
    """The surroundings of one pass.

    Attributes:
        facts: sites, norms, streams and attentions of the program that the pass rewrites.
        statistics: of the program's values, those that the pass needs by its registration.
        batches: calibration data; None where there is none.
        rules: the first matching rule of a site name, or None. A pass may write formats here for the quantizing
            pass behind it (PerTensorActivations).
        keep_float: sites that the caller keeps float -> the reason.
        sites: the report of every site, by name; who quantizes a site fills it in.
        constants: what earlier passes computed for the key/value cache.
        reference: the program before all passes.
        keep_float_weights: a later pass compares the codes with the float weights, so they must be kept (LoRC).
        finished: keeps the sites that are solved; None: nothing is kept.
        offload: where values of batches go that are not being computed with; None: they stay in memory.
        progress: whether to show bars.
        last_iterator: what `batches` gave last, if it is an iterator: it cannot be read again.
    """

    facts: Facts
    statistics: Statistics = field(default_factory=Statistics)
    batches: Batches | None = None
    rules: dict[str, Rule | None] = field(default_factory=dict)
    keep_float: dict[str, str] = field(default_factory=dict)
    sites: dict[str, SiteReport] = field(default_factory=dict)
    constants: KVConstants = field(default_factory=KVConstants)
    reference: Program | None = None
    keep_float_weights: bool = False
    finished: FinishedSites | None = None
    offload: SpillFolder | None = None
    progress: bool = False
    last_iterator: Iterator[Sequence[Any]] | None = field(default=None, repr=False)

    @staticmethod
    def of(program: Program, **rest: Any) -> PassContext:
        """The context of a pass that is called by itself, without a recipe."""
        return PassContext(Facts(program), reference=program, **rest)

    def on(self, program: Program, **changes: Any) -> PassContext:
        """The same surroundings for a copy of the program, on which a search tries a pass: no site is reported."""
        return dataclasses.replace(self, **{"facts": Facts(program), "sites": {}, "finished": None, **changes})

    def data(self) -> Iterable[Sequence[Any]]:
        """A fresh iterator of the calibration batches. Raises CalibrationError if there are none."""
        if self.batches is None:
            raise CalibrationError("this pass needs calibration data: give batches")
        data = self.batches()
        if isinstance(data, Iterator) and data is self.last_iterator:
            raise CalibrationError(
                "`batches` gave one iterator twice, and a pass before has read it to its end. Fix: give a new iterator "
                "each time, or a list"
            )
        self.last_iterator = data if isinstance(data, Iterator) else None
        return data

    def layerwise_run(self, program: Program, *, shared: bool = False) -> LayerwiseRun:
        """All batches, before the first node of a program.

        Args:
            program: what runs.
            shared: only this rank's share of them: the caller adds its sums up over the ranks.

        Raises:
            CalibrationError: an empty iterator.
        """
        ranks = self.ranks if shared else Ranks()
        data, blocks = ranks.share(list(self.data()))
        run = LayerwiseRun(program, data, blocks=blocks, offload=self.offload)
        if not run.values:
            raise CalibrationError("the calibration iterator is empty: give at least one batch")
        return run

    @property
    def ranks(self) -> Ranks:
        """The processes that share this run."""
        return Ranks() if self.finished is None else self.finished.ranks

    def track(self, items: Iterable[T], label: str) -> Iterable[T]:
        """The items, with a progress bar where bars are shown."""
        return track(items, label, disable=not self.progress, transient=True)

    def figures_of(self, items: Sequence[T], figure: Callable[[T], float], label: str) -> dict[T, float]:
        """A figure for each item, as the loss of a candidate: each rank computes some, and all get the same.

        Args:
            items: all different, in the same order on every rank.
            figure: of an item; the same on every rank.
            label: of the progress bar.
        """
        found = torch.zeros(len(items), dtype=torch.float64)
        for index in self.track(range(self.ranks.rank, len(items), self.ranks.count), label):
            found[index] = figure(items[index])
        self.ranks.add(found)
        return dict(zip(items, found.tolist(), strict=True))

    def skip(self, report: PassReport, site: str, reason: str, node: str = "") -> None:
        """Record that a quantizing pass keeps a site float, in its report and in the site's own."""
        report.skip(site, reason, node)
        if site in self.sites:
            self.sites[site].reason = reason
