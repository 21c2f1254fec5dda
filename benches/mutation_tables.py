"""The tables of docs/results/mutations.md, for update_docs.py, from benches/results/mutations.json.

<!-- mutations -->           a row for each source file
<!-- mutations-unnoticed --> edits that no test noticed, with the reason where none could
"""

from __future__ import annotations

import collections

from compile_tables import RESULTS, read


def rows() -> list[dict[str, object]]:
    """One for each edit that was tried; none before the first run."""
    return list(read("mutations")["rows"].values()) if (RESULTS / "mutations.json").is_file() else []


def by_file(_: str) -> str:
    """Edits, and how many of those that a test could notice were noticed."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows():
        kind = "equivalent" if row["equivalent"] else "unnoticed" if row["outcome"] == "survived" else "noticed"
        counts[str(row["file"])][kind] += 1
    lines = ["| file | noticed | unnoticed | change nothing |", "|---|---|---|---|"]
    total: collections.Counter[str] = collections.Counter()
    for file, count in sorted(counts.items()):
        lines.append(f"| {file} | {count['noticed']} | {count['unnoticed'] or ''} | {count['equivalent'] or ''} |")
        total += count
    share = total["noticed"] / max(1, total["noticed"] + total["unnoticed"])
    lines.append(f"| all | {total['noticed']} ({share:.1%}) | {total['unnoticed']} | {total['equivalent']} |")
    return "\n".join(lines)


def unnoticed(_: str) -> str:
    """What survived: first what a test could have noticed."""
    found = [row for row in rows() if row["equivalent"] or row["outcome"] == "survived"]
    lines = ["| file | mistake | why no test can notice it |", "|---|---|---|"]
    for row in sorted(found, key=lambda row: (bool(row["equivalent"]), str(row["file"]))):
        cells = (row["file"], row["breaks"], row["equivalent"] or "one could")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines)


TABLES = {"mutations": by_file, "mutations-unnoticed": unnoticed}
