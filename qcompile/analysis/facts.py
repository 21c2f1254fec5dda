"""Facts: what the analyses say of a program, computed when first asked for and kept until its graph changes.

Passes get the facts of the program that they rewrite, so that no two of them search it for the same thing. A fact
belongs to one version of the graph (`Program.version`); after a rewriting it is found anew. What an analysis reads of
weights, as whether a norm's gain is one, is as it was when the fact was found: a pass that changes such weights and
asks again takes `Facts(program)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from qcompile.analysis.attention_scores import AttentionMatmul, attention_matmuls
from qcompile.analysis.norms import Norm, find_norms
from qcompile.analysis.residual_stream import ResidualStream, residual_streams
from qcompile.analysis.scale_folding import Consumers, groups_of_consumers
from qcompile.analysis.sites import Site, find_sites
from qcompile.ir.program import Program

T = TypeVar("T")


class Facts:
    """The analyses of one program.

    Attributes:
        program: what the facts are about.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._version = program.version
        self._found: dict[str, Any] = {}

    @property
    def sites(self) -> list[Site]:
        """All sites in graph order."""
        return self._fact("sites", lambda: find_sites(self.program))

    @property
    def norms(self) -> list[Norm]:
        """All norms in graph order."""
        return self._fact("norms", lambda: find_norms(self.program))

    @property
    def norm_outputs(self) -> set[Any]:
        """The nodes that norms hand on."""
        return self._fact("norm_outputs", lambda: {norm.output for norm in self.norms})

    @property
    def streams(self) -> list[ResidualStream]:
        """The residual streams, closed and open."""
        return self._fact("streams", lambda: residual_streams(self.program))

    @property
    def attentions(self) -> list[AttentionMatmul]:
        """The products of queries and keys, one for each attention."""
        return self._fact("attentions", lambda: attention_matmuls(self.program))

    @property
    def consumers(self) -> list[Consumers]:
        """The sites grouped by the value that they read."""
        return self._fact("consumers", lambda: groups_of_consumers(self.sites))

    def _fact(self, name: str, find: Callable[[], T]) -> T:
        if self._version != self.program.version:
            self._found.clear()
            self._version = self.program.version
        if name not in self._found:
            self._found[name] = find()
        found: T = self._found[name]
        return found
