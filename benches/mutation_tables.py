"""The tables of docs/results/mutations.md, for update_docs.py, from benches/results/mutations.json.

<!-- mutations -->           a row for each folder of sources
<!-- mutations-unnoticed --> edits that no test noticed, with the reason where none could
"""

from __future__ import annotations

import collections
import tomllib
from pathlib import Path

from compile_tables import RESULTS, read

LISTS = Path(__file__).parents[1] / "tests" / "mutations"


def rows() -> list[dict[str, object]]:
    """One for each edit that was tried; none before the first run."""
    return list(read("mutations")["rows"].values()) if (RESULTS / "mutations.json").is_file() else []


def listed() -> collections.Counter[str]:
    """How many edits each folder has in the lists."""
    tables = [tomllib.loads(path.read_text())["edit"] for path in sorted(LISTS.glob("*.toml"))]
    return collections.Counter(folder(edit["file"]) for edits in tables for edit in edits)


def folder(file: str) -> str:
    """Where a source file lies; `qcompile/passes` and `qcompile/codegen` are links."""
    return str(Path(file.removeprefix("qcompile/")).parent)


def by_folder(_: str) -> str:
    """Edits, and how many of those that were tried and that a test could notice were noticed."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows():
        kind = "equivalent" if row["equivalent"] else "unnoticed" if row["outcome"] == "survived" else "noticed"
        counts[folder(str(row["file"]))][kind] += 1
    lines = ["| folder | noticed | unnoticed | change nothing | not tried yet |", "|---|---|---|---|---|"]
    total: collections.Counter[str] = collections.Counter()
    for place, edits in sorted(listed().items()):
        count = counts[place]
        count["untried"] = edits - count.total()
        cells = [str(count[kind] or "") for kind in ("noticed", "unnoticed", "equivalent", "untried")]
        lines.append(f"| {place} | {' | '.join(cells)} |")
        total += count
    share = total["noticed"] / max(1, total.total() - total["equivalent"])
    last = f"{total['unnoticed']} | {total['equivalent']} | {total['untried']}"
    lines.append(f"| all | {total['noticed']} ({share:.1%}) | {last} |")
    return "\n".join(lines)


def unnoticed(_: str) -> str:
    """What survived: first what a test could have noticed."""
    found = [row for row in rows() if row["equivalent"] or row["outcome"] == "survived"]
    lines = ["| file | mistake | why no test can notice it |", "|---|---|---|"]
    for row in sorted(found, key=lambda row: (bool(row["equivalent"]), str(row["file"]))):
        cells = (row["file"], row["breaks"], row["equivalent"] or "one could")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines)


TABLES = {"mutations": by_folder, "mutations-unnoticed": unnoticed}
