"""A deliberate mistake in one source file, and the tests that must fail."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@dataclass(frozen=True)
class Edit:
    """One mistake.

    Attributes:
        file: the source file, from the root of the repository.
        old: its text, which occurs there once.
        new: what stands there instead.
        breaks: the case that goes wrong, in words.
        tests: arguments for pytest: files, or single tests.
        equivalent: why no test can tell the two apart; such an edit is expected to survive.
    """

    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def apply(self, text: str) -> str:
        """The file's text with the mistake.

        Raises:
            ValueError: the old text does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: the text of the edit {self.breaks!r} occurs {count} times: {self.old!r}")
        return text.replace(self.old, self.new)


def edits() -> list[Edit]:
    """All edits of the lists in this folder, in their order."""
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        for table in tomllib.loads(path.read_text()).get("edit", []):
            found.append(Edit(**{**table, "tests": tuple(table["tests"])}))
    return found
