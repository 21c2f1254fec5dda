"""Which test functions `make check` leaves to `make test`: those whose cases take long, by a run that was timed.

    pytest -m "not slow and not exhaustive" --junitxml times.xml
    python tests/slower_functions.py times.xml          writes tests/slower_functions.txt

A function is listed if a case of it takes 0.4 s or more, on average. A new function is not, until somebody times again.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

LISTED = Path(__file__).with_suffix(".txt")
SECONDS = 0.4


def function_of(nodeid: str) -> str:
    """A test's file and name, without the parameters of a case."""
    return nodeid.partition("[")[0]


def slower(report: Path) -> list[str]:
    """The functions of a timed run that are listed, as pytest names them."""
    times: dict[str, list[float]] = defaultdict(list)
    for case in ET.parse(report).iter("testcase"):
        parts = case.attrib["classname"].split(".")
        owner = next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
        file = "/".join(parts[: owner + 1]) + ".py"
        name = "::".join([file, *parts[owner + 1 :], case.attrib["name"]])
        times[function_of(name)].append(float(case.attrib["time"]))
    return sorted(name for name, of in times.items() if sum(of) / len(of) >= SECONDS)


if __name__ == "__main__":
    LISTED.write_text("".join(f"{name}\n" for name in slower(Path(sys.argv[1]))))
