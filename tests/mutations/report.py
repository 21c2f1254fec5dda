"""What became of every edit: a file that grows with each run, and that an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from pathlib import Path

from mutations.edit import ROOT, Edit

PATH = ROOT / "benches/results/mutations.json"


def key_of(edit: Edit) -> str:
    """A digest of all that an edit says."""
    return hashlib.sha256(repr(astuple(edit)).encode()).hexdigest()[:16]


@dataclass
class Report:
    """Outcomes by the digest of an edit.

    Attributes:
        versions: of the packages of the last run.
        rows: key -> file, breaks, equivalent, outcome ("killed", "timeout" or "survived").
    """

    versions: dict[str, str] = field(default_factory=dict)
    rows: dict[str, dict[str, object]] = field(default_factory=dict)

    @staticmethod
    def read() -> Report:
        """The committed report; an empty one if there is none."""
        return Report(**json.loads(PATH.read_text())) if PATH.is_file() else Report()

    def add(self, edit: Edit, outcome: str) -> None:
        """Record one outcome."""
        self.rows[key_of(edit)] = {
            "file": edit.file,
            "breaks": edit.breaks,
            "equivalent": edit.equivalent,
            "outcome": outcome,
        }

    def write(self, listed: Iterable[Edit], path: Path = PATH) -> None:
        """Write the outcomes of the edits that are listed, in their order."""
        rows = {key: self.rows[key] for key in map(key_of, listed) if key in self.rows}
        path.write_text(json.dumps({"versions": self.versions, "rows": rows}, indent=1) + "\n")

    def settles(self, edit: Edit) -> bool:
        """Whether an edit was tried, and did what it should."""
        row = self.rows.get(key_of(edit))
        return row is not None and (row["outcome"] == "survived") == bool(edit.equivalent)

    def score(self) -> tuple[int, int, int]:
        """Edits noticed, edits that a test could notice, and edits that change nothing."""
        told = [row for row in self.rows.values() if not row["equivalent"]]
        return sum(row["outcome"] != "survived" for row in told), len(told), len(self.rows) - len(told)
