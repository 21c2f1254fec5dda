"""Every architecture of tests/zoo through every step of tests/zoo/steps.py.

    python benches/architectures.py [--inductor] [--jobs 2] [--seconds 300] [--step NAME]* [architecture ..]

Each architecture runs in a process of its own. Writes benches/results/architectures.json after each; others keep their
rows. docs/architectures.md is made from it by benches/update_docs.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results" / "architectures.json"
Rows = dict[str, dict[str, object]]


def one(name: str, steps: list[str], inductor: bool, path: str) -> None:
    """In this process; writes a line of JSON for each step."""
    from zoo.shortcuts import one_export, without_inductor
    from zoo.steps import STEPS, Case, attempt

    case = Case(name)
    with one_export(), contextlib.nullcontext() if inductor else without_inductor(), open(path, "a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, **dataclasses.asdict(attempt(STEPS[step], case))}) + "\n")
            file.flush()


class Run:
    """One architecture in a process of its own, which begins with all that this one has imported."""

    def __init__(self, name: str, steps: list[str], inductor: bool, seconds: int) -> None:
        self.name, self.steps, self.seconds = name, steps, seconds
        self.file = tempfile.NamedTemporaryFile("r")
        work = (name, steps, inductor, self.file.name)
        self.process = multiprocessing.get_context("fork").Process(target=one, args=work)
        self.start = time.perf_counter()
        self.process.start()

    def finished(self) -> Rows | None:
        """The outcomes, or None while it runs and has time."""
        late = time.perf_counter() - self.start > self.seconds
        if self.process.is_alive() and not late:
            return None
        self.process.kill()
        self.process.join()
        rows = [json.loads(line) for line in self.file.read().splitlines() if line.endswith("}")]
        found: Rows = {row.pop("step"): row for row in rows}
        missing = [step for step in self.steps if step not in found]
        if missing:
            ended = f"the process ended with exit code {self.process.exitcode}"
            reason = f"more than {self.seconds} s for all steps" if late else ended
            found[missing[0]] = {"mark": "FAULT", "error": None, "text": reason, "seconds": 0.0}
        return found


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--step", action="append", dest="steps")
    parser.add_argument("--inductor", action="store_true", help="compile with Inductor too: many times as long")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--seconds", type=int, default=300, help="for one architecture")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()

    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from zoo import ARCHITECTURES
    from zoo.steps import STEPS, Case, applies, attempt

    from qcompile.memory.environment import versions

    torch.set_num_threads(1)
    torch._dynamo.config.fake_tensor_cache_enabled = False  # a fifth of the time, for two layers
    attempt(STEPS["int8"], Case("mlp"))  # imports what the first export imports

    rows = json.loads(given.results.read_text())["architectures"] if given.results.exists() else {}
    waiting, running = list(given.architectures or ARCHITECTURES), []
    while waiting or running:
        while waiting and len(running) < given.jobs:
            name = waiting.pop(0)
            steps = [step for step in given.steps or STEPS if applies(step, name)]
            running.append(Run(name, steps, given.inductor, given.seconds))
        time.sleep(0.1)
        for run in list(running):
            found = run.finished()
            if found is None:
                continue
            running.remove(run)
            old = rows.get(run.name, {}) if given.steps else {}
            merged = {**old, **found}
            rows[run.name] = {step: merged[step] for step in STEPS if step in merged}
            ordered = {name: rows[name] for name in ARCHITECTURES if name in rows}
            given.results.write_text(json.dumps({"versions": versions(), "architectures": ordered}, indent=1) + "\n")
            marks = " ".join(f"{step}={row['mark']}" for step, row in found.items() if row["mark"] != "pass")
            print(f"{run.name}: {time.perf_counter() - run.start:.0f} s {marks or 'all pass'}", flush=True)


if __name__ == "__main__":
    main()
