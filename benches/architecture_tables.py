"""The table of docs/architectures.md, for update_docs.py, from benches/results/architectures.json.

<!-- architectures -->      a row for each architecture, a column for each step, the reasons in the last
<!-- architecture-counts -->  steps by outcome
"""

from __future__ import annotations

import collections

from compile_tables import RESULTS, read

SIGNS = {"pass": "+", "refused": "refused", "FAULT": "FAULT", "": ""}


def outcomes() -> dict[str, dict[str, dict[str, object]]]:
    """Architecture -> step -> outcome; none before the first run."""
    return read("architectures")["architectures"] if (RESULTS / "architectures.json").is_file() else {}


def cell(found: dict[str, object] | None) -> str:
    """The error against float where a step measures it, else a sign."""
    if found is None:
        return ""
    if found["mark"] == "pass" and found["error"] is not None:
        return f"{found['error']:.3f}"
    return SIGNS[str(found["mark"])]


def reasons(steps: dict[str, dict[str, object]]) -> str:
    """What was refused or is at fault, each text once with its steps."""
    texts: dict[str, list[str]] = collections.defaultdict(list)
    for step, found in steps.items():
        if found["text"]:
            texts[str(found["text"])].append(step)
    return "; ".join(f"{', '.join(where)}: {text}" for text, where in texts.items()).replace("<", "&lt;")


def architectures(_: str) -> str:
    """One row for each."""
    rows = outcomes()
    steps = list(dict.fromkeys(step for found in rows.values() for step in found))
    lines = [f"| architecture | {' | '.join(steps)} | reasons |", "|---" * (len(steps) + 2) + "|"]
    for name, found in rows.items():
        cells = " | ".join(cell(found.get(step)) for step in steps)
        lines.append(f"| {name} | {cells} | {reasons(found)} |")
    return "\n".join(lines)


def counts(_: str) -> str:
    """How many steps came to what."""
    rows = outcomes()
    found = collections.Counter(str(o["mark"]) for steps in rows.values() for o in steps.values())
    total = sum(found.values())
    marks = f"{found['pass']} pass, {found['refused']} refused, {found['FAULT']} at fault"
    return f"{len(rows)} architectures, {total} steps: {marks}."


TABLES = {"architectures": architectures, "architecture-counts": counts}
