"""How many cases of a slow test function `make check` and `make test` run; `make exhaustive` runs all.

    pytest --junitxml times.xml                         every case, timed
    python tests/case_budget.py times.xml               writes tests/case_budget.txt

A line is "CHECK TEST FUNCTION": the cases that each of the two runs; a function that is not listed runs whole in both.
Every function keeps a case in `make test`, chosen by a hash of its name, so that all laws are tried there; what is left
out are further parameters of the same function. `make check` has no function whose cases take long.
"""

from __future__ import annotations

import hashlib
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

LISTED = Path(__file__).with_suffix(".txt")
RUNS = ("check", "test")
SLOW = 0.4
"""Seconds of a case, on average, from which `make check` leaves a function out."""
MINUTES = 60
"""Of processor time that the cases of `make test` take together: half an hour on two cores, beside style and types."""


def function_of(nodeid: str) -> str:
    """A test's file and name, without the parameters of a case."""
    return nodeid.partition("[")[0]


def kept(run: str) -> dict[str, int]:
    """Function -> how many cases a run keeps, of those that are listed."""
    column = RUNS.index(run)
    lines = [line.split(maxsplit=2) for line in LISTED.read_text().splitlines()]
    return {line[2]: int(line[column]) for line in lines}


def chosen(nodeids: Iterable[str], limits: dict[str, int]) -> set[str]:
    """The cases that are kept: of a listed function those whose names have the smallest hashes."""
    cases: dict[str, list[str]] = defaultdict(list)
    for nodeid in nodeids:
        cases[function_of(nodeid)].append(nodeid)
    found: set[str] = set()
    for function, own in cases.items():
        found.update(sorted(own, key=_hash)[: limits.get(function, len(own))])
    return found


def _hash(nodeid: str) -> str:
    return hashlib.sha256(nodeid.encode()).hexdigest()


def timed(report: Path) -> dict[str, list[float]]:
    """Function -> seconds of its cases, of a timed run."""
    times: dict[str, list[float]] = defaultdict(list)
    for case in ET.parse(report).iter("testcase"):
        parts = case.attrib["classname"].split(".")
        owner = next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
        file = "/".join(parts[: owner + 1]) + ".py"
        name = "::".join([file, *parts[owner + 1 :], case.attrib["name"]])
        times[function_of(name)].append(float(case.attrib["time"]))
    return times


def budget(times: dict[str, list[float]], minutes: float) -> dict[str, int]:
    """Function -> how many cases it keeps so that all take `minutes`: each may take as long as any, and has one."""
    least, most = 0.0, 1 + 2 * max(sum(own) for own in times.values())

    def keep(seconds: float) -> dict[str, int]:
        return {name: max(1, min(len(own), int(seconds / _mean(own)))) for name, own in times.items()}

    for _ in range(40):
        middle = (least + most) / 2
        total = sum(count * _mean(times[name]) for name, count in keep(middle).items())
        least, most = (least, middle) if total > 60 * minutes else (middle, most)
    return keep(least)


def _mean(seconds: list[float]) -> float:
    return max(sum(seconds) / len(seconds), 1e-4)


def lines(times: dict[str, list[float]], minutes: float = MINUTES) -> list[str]:
    """The lines of the list: functions of which one of the runs leaves something out."""
    whole = budget(times, minutes)
    found = []
    for name, own in sorted(times.items()):
        check = 0 if _mean(own) >= SLOW else len(own)
        if check < len(own) or whole[name] < len(own):
            found.append(f"{min(check, whole[name])} {whole[name]} {name}")
    return found


if __name__ == "__main__":
    LISTED.write_text("".join(f"{line}\n" for line in lines(timed(Path(sys.argv[1])))))
