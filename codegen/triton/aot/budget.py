"""What every shipped kernel may cost: budget.json, within a tenth; and the check of all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompile.codegen.triton.aot.compile_kernels import Built, build, complaints
from qcompile.codegen.triton.aot.shipped_kernels import Shipped, shipped

FILE = Path(__file__).parent / "budget.json"
SLACK = 0.1


@dataclass(frozen=True)
class Checked:
    """One kernel on one architecture.

    Attributes:
        built: None if it did not compile. complaints: what must not be. over: where it is not as in the budget.
    """

    kernel: str
    architecture: int
    built: Built | None
    complaints: list[str]
    over: list[str] = field(default_factory=list)


def check(architectures: Iterable[int], only: str = "") -> Iterator[Checked]:
    """Compile all shipped kernels whose names hold `only`, in as many processes as there are cores."""
    work = [(kernel, arch) for arch in architectures for kernel in shipped(arch) if only in str(kernel)]
    context = multiprocessing.get_context("spawn")  # the compiler has threads, which a fork would lose
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(_check, work, chunksize=4)


def _check(work: tuple[Shipped, int]) -> Checked:
    kernel, architecture = work
    try:
        built = build(kernel.spec, kernel.launch, architecture, **kernel.constants)
    except Exception as error:  # the compiler raises whatever it likes
        last = (str(error).strip().splitlines() or [""])[-1]
        return Checked(str(kernel), architecture, None, [f"{type(error).__name__}: {last[:200]}"])
    found = complaints(kernel.spec, kernel.launch, architecture, built)
    return Checked(str(kernel), architecture, built, found, over_budget(str(kernel), architecture, built))


def over_budget(kernel: str, architecture: int, built: Built) -> list[str]:
    """Where a kernel costs a tenth more or less than budget.json says; nothing for another version of triton."""
    import triton

    budget = read()
    if budget["triton"] != triton.__version__:
        return []
    of = budget["kernels"].get(str(architecture), {}).get(kernel)
    if of is None:
        return ["not in budget.json: qcompile kernels check --update writes it"]
    found = []
    for name in ("registers", "shared", "instructions"):
        now, then = getattr(built, name), of[name]
        if abs(now - then) > SLACK * then:
            found.append(f"{now} {name} for {then} of the budget")
    if built.mma.keys() != of["mma"].keys():
        found.append(f"tensor cores by {', '.join(built.mma) or 'nothing'} for {', '.join(of['mma'])} of the budget")
    return found


def write(rows: Iterable[Checked]) -> None:
    """Make what was measured the budget, but for kernels with complaints; those that are not in `rows` keep theirs."""
    import triton

    budget = read()
    kernels: dict[str, dict[str, Any]] = budget["kernels"] if budget["triton"] == triton.__version__ else {}
    for row in rows:
        if row.built is not None and not row.complaints:
            kernels.setdefault(str(row.architecture), {})[row.kernel] = asdict(row.built)
    FILE.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=0, sort_keys=True) + "\n")


def read() -> dict[str, Any]:
    """{"triton": version, "kernels": {architecture: {kernel: what it costs}}}."""
    if not FILE.is_file():
        return {"triton": "", "kernels": {}}
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found
