"""Make each deliberate mistake in a copy of the repository, run its tests there, and report what nobody noticed.

    python tests/mutations/run.py [--only TEXT] [--missing] [--jobs 2]

Mistakes are listed by hand in *.toml: dropped guards, swapped axes, wrong signs. Tools that make them from the syntax
tree (mutmut, cosmic-ray) know neither C++ nor kernel templates, and mostly make edits that change nothing or that any
import notices; a run of every test that reaches a flow analysis would take days. PyTorch is imported once, and each
edit runs in a fork of that process.

Outcomes go to benches/results/mutations.json as they come, which benches/update_docs.py makes docs/mutations.md from.
"""

from __future__ import annotations

import argparse
import compileall
import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import TypeVar

# Before torch is imported, as tests/conftest.py does.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("QCOMPILE_EXHAUSTIVE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with threads would hang

import hypothesis  # noqa: E402, F401
import pytest  # noqa: E402
import torch._dynamo  # noqa: E402, F401
import torch._inductor.config  # noqa: E402, F401
import transformers  # noqa: E402, F401
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations.edit import ROOT, Edit, edits  # noqa: E402
from mutations.report import Report  # noqa: E402

torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),))  # what the first export imports, once
gc.freeze()  # else collections in the forks would copy all pages

TIMEOUT = 900  # seconds: an edit that never ends is noticed, too
T = TypeVar("T")


def copy_of_the_repository(folder: Path) -> Path:
    """Copy what git tracks or would track, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    compileall.compile_dir(folder, quiet=2)  # once, instead of in each fork
    return folder


def run_pytest(copy: Path, tests: tuple[str, ...], log: Path) -> None:
    """Run tests of a copy, in a process of their own, and exit as pytest does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True  # of a source that is edited again within the clock's tick
    for name in [name for name in sys.modules if name.split(".")[0] in ("mutations", "qcompile")]:
        del sys.modules[name]
    imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # here, before the fork
    options = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "-W", imported]
    if not all("::" in test for test in tests):  # of a whole file the fast ones; a test that is named runs, slow or not
        options += ["-m", "not slow"]
    os._exit(pytest.main([*options, *tests]))


def exit_code(copy: Path, tests: tuple[str, ...]) -> int | None:
    """Of pytest; None if it did not end in time."""
    log = copy / "pytest.log"
    process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(copy, tests, log))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def outcome_of(edit: Edit, copy: Path) -> str:
    """ "killed", "timeout" or "survived"."""
    path = copy / edit.file
    text = path.read_text()
    path.write_text(edit.apply(text))
    try:
        code = exit_code(copy, edit.tests)
    finally:
        path.write_text(text)
    if code in (4, 5):
        raise SystemExit(f"{edit.file}, {edit.breaks}: pytest found no such tests: {' '.join(edit.tests)}")
    return "timeout" if code is None else "survived" if code == 0 else "killed"


def main() -> None:
    """Run the edits that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="edits whose file or description contains this")
    parser.add_argument("--missing", action="store_true", help="edits that the report does not have, or that survived")
    parser.add_argument("--jobs", type=int, default=1, help="edits at a time")
    asked = parser.parse_args()
    listed, report = edits(), Report.read()
    for edit in listed:  # all lists are right before the first test runs
        edit.apply((ROOT / edit.file).read_text())
    chosen = [
        edit
        for edit in listed
        if asked.only in f"{edit.file} {edit.breaks}" and not (asked.missing and report.settles(edit))
    ]
    report.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    console, lock = Console(), Lock()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(asked.jobs) as pool,
        Progress(console=console) as bar,
    ):
        copies: Queue[Path] = Queue()
        for number in range(asked.jobs):
            copies.put(copy_of_the_repository(Path(folder) / str(number)))

        def in_a_copy(work: Callable[[Path], T]) -> T:
            copy = copies.get()
            try:
                return work(copy)
            finally:
                copies.put(copy)

        selections = sorted({edit.tests for edit in chosen})
        task = bar.add_task("tests without a mistake", total=len(selections))

        def passes(tests: tuple[str, ...]) -> bool:
            code = in_a_copy(lambda copy: exit_code(copy, tests))
            bar.advance(task)
            return code == 0

        green = dict(zip(selections, pool.map(passes, selections), strict=True))
        red = [" ".join(tests) for tests in selections if not green[tests]]
        chosen = [edit for edit in chosen if green[edit.tests]]
        task = bar.add_task("mistakes", total=len(chosen))

        def try_out(edit: Edit) -> None:
            outcome = in_a_copy(lambda copy: outcome_of(edit, copy))
            with lock:
                report.add(edit, outcome)
                report.write(listed)
            bar.advance(task)
            if outcome == "survived" and not edit.equivalent:
                console.print(f"survived: {edit.file}: {edit.breaks}", style="red", markup=False, highlight=False)

        list(pool.map(try_out, chosen))

    noticed, could, same = report.score()
    console.print(
        f"{noticed} of the {could} mistakes tried were noticed ({noticed / max(1, could):.1%}); "
        f"{same} more change nothing"
    )
    if red:
        raise SystemExit("red without any mistake, so nothing was tried with them:\n  " + "\n  ".join(red))
    sys.exit(noticed != could)


if __name__ == "__main__":
    main()
