"""The first ten minutes on a GPU: does it run, is it right, and which prediction is wrong.

    python benches/first_contact.py                  all steps, each with a limit; ten minutes at most
    python benches/first_contact.py gemm model       steps whose names begin so
    python benches/first_contact.py --list           what would run, without a GPU

Every step is a process of its own with a limit: an illegal access, which would fail everything after it in the same
process, or a compiler that hangs costs one step. A finding is one line of JSON, written to
benches/results/first_contact.jsonl as soon as it is known; the table of all comes last. Needs no installation: the
checkout is enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "first_contact.jsonl"
TOTAL = 595.0  # seconds: what of the steps does not fit is named
Finding = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of the step.
        seconds: after which it is killed.
        command: what runs; its lines that are JSON objects are findings, and its exit status is one.
    """

    name: str
    seconds: float
    command: list[str]


def own(name: str, seconds: float) -> Step:
    """A step that is a function of first_contact_steps.py."""
    return Step(name, seconds, [sys.executable, str(HERE / "first_contact_steps.py"), *name.split(":")])


def tests(name: str, seconds: float, *arguments: str) -> Step:
    """A step that is a part of the test suite; on a GPU the tests of kernels run there."""
    return Step(name, seconds, [sys.executable, "-m", "pytest", "-q", "-x", "-n", "8", *arguments])


def steps() -> list[Step]:
    """In the order of what each is worth if nothing comes after it."""
    launch = str(HERE.parent / "tests" / "codegen" / "triton" / "launch")
    return [
        own("machine", 60),
        tests("kernels are right", 150, launch),
        tests("whole models", 120, "-m", "gpu", str(HERE.parent / "tests" / "test_gpu.py")),
        *(own(f"gemm:{k}x{n}", 60) for k, n in ((4096, 4096), (14336, 4096), (4096, 14336))),
        own("rows", 30),
        own("attention", 30),
        *(own(f"model:{candidate}", 60) for candidate in ("inductor", "w4a16", "int8", "w4a8", "fp8")),
        own("graphs:int8-rotated", 60),
    ]


def run(step: Step, keep: Callable[[Finding], None]) -> None:
    """Run a step; `keep` is given each finding when it is there, and the end of the step."""
    start = time.monotonic()
    process = subprocess.Popen(
        step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent, env=environment()
    )
    try:
        output, _ = process.communicate(timeout=step.seconds)
        status: int | str = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, status = process.communicate()[0], f"stopped after {step.seconds:g} s"
    last = ""
    for line in output.splitlines():
        finding = finding_of(line)
        if finding is None:
            last = line or last
        else:
            keep(dict(step=step.name, **finding))
    end: Finding = dict(step=step.name, status=status, seconds=round(time.monotonic() - start, 1))
    keep(end if status == 0 else end | dict(output=output[-2000:], last=last[-200:]))


def environment() -> dict[str, str]:
    """With the checkout and the benches on the path, and kernels compiled, not interpreted."""
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return plain | {"PYTHONPATH": os.pathsep.join(paths)}


def finding_of(line: str) -> Finding | None:
    """A line of JSON as a finding; None for any other."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def table_of(findings: list[Finding]) -> Table:
    """All findings, those that failed in red."""
    table = Table("step", "finding")
    for finding in findings:
        rest = {name: value for name, value in finding.items() if name not in ("step", "output")}
        text = ", ".join(f"{name} {value}" for name, value in rest.items())
        failed = finding.get("status", 0) != 0 or finding.get("ok") is False
        table.add_row(finding["step"], f"[red]{text}[/]" if failed else text)
    return table


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only steps whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="print the steps and their limits")
    arguments = parser.parse_args()
    chosen = list(chosen_steps(arguments.names))
    if not chosen:
        raise SystemExit(
            f"no step begins with {', '.join(arguments.names)}; there are {', '.join(s.name for s in steps())}"
        )
    if arguments.list:
        print("\n".join(f"{step.name}: {step.seconds:g} s, {' '.join(step.command)}" for step in chosen))
        return
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        raise SystemExit("no NVIDIA GPU here: nothing was measured, and nothing was written")
    findings: list[Finding] = []
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:

        def keep(finding: Finding) -> None:
            findings.append(finding)
            file.write(json.dumps(finding) + "\n")
            file.flush()

        start = time.monotonic()
        for step in chosen:
            left = TOTAL - (time.monotonic() - start)
            if left < 1:
                keep(dict(step=step.name, status="out of time"))
                continue
            print(step.name, flush=True)
            run(dataclasses.replace(step, seconds=min(step.seconds, left)), keep)
    Console(width=200).print(table_of(findings))


def chosen_steps(names: list[str]) -> Iterator[Step]:
    """Those whose names begin with one of these; all for none."""
    return (step for step in steps() if not names or any(step.name.startswith(name) for name in names))


if __name__ == "__main__":
    main()
