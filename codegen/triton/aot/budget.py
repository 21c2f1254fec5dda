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

from qcompile.codegen.triton.aot.compile_kernels import KernelCost, compile_kernel, complaints
from qcompile.codegen.triton.aot.shipped_kernels import ShippedKernel, shipped

FILE = Path(__file__).parent / "budget.json"
SLACK = 0.1  # of the budget, to either side


@dataclass(frozen=True)
class CheckedKernel:
    """One kernel on one architecture.

    Attributes:
        kernel: its text, see ShippedKernel.
        architecture: 90 for sm_90.
        cost: None if it did not compile.
        complaints: what must not be.
        over: where it is not as in the budget.
    """

    kernel: str
    architecture: int
    cost: KernelCost | None
    complaints: list[str]
    over: list[str] = field(default_factory=list)


def check(architectures: Iterable[int], only: str = "") -> Iterator[CheckedKernel]:
    """Compile all shipped kernels whose names contain `only`, in as many processes as there are cores."""
    work = [(kernel, arch) for arch in architectures for kernel in shipped(arch) if only in str(kernel)]
    context = multiprocessing.get_context("spawn")  # the compiler has threads, which a fork would lose
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(_check, work, chunksize=4)


def _check(work: tuple[ShippedKernel, int]) -> CheckedKernel:
    kernel, architecture = work
    try:
        cost = compile_kernel(kernel.spec, kernel.launch, architecture, **kernel.constants)
    except Exception as error:  # the compiler raises whatever it likes
        last = (str(error).strip().splitlines() or [""])[-1]
        return CheckedKernel(str(kernel), architecture, None, [f"{type(error).__name__}: {last[:200]}"])
    found = complaints(kernel.spec, architecture, cost)
    return CheckedKernel(str(kernel), architecture, cost, found, over_budget(str(kernel), architecture, cost))


def over_budget(kernel: str, architecture: int, cost: KernelCost) -> list[str]:
    """Where a kernel costs a tenth more or less than budget.json says; nothing for another version of triton."""
    import triton

    budget = read()
    if budget["triton"] != triton.__version__:
        return []
    allowed = budget["kernels"].get(str(architecture), {}).get(kernel)
    if allowed is None:
        return ["not in budget.json. Fix: qcompile kernels check --update writes it"]
    found = []
    for name in ("registers", "shared", "instructions"):
        now, budgeted = getattr(cost, name), allowed[name]
        if abs(now - budgeted) > SLACK * budgeted:
            found.append(f"{now} {name} for {budgeted} of the budget")
    if cost.mma.keys() != allowed["mma"].keys():
        families = ", ".join(cost.mma) or "nothing"
        found.append(f"tensor cores by {families} for {', '.join(allowed['mma'])} of the budget")
    return found


def write(rows: Iterable[CheckedKernel], *, whole: bool = False) -> None:
    """Make what was measured the budget, but for kernels with complaints.

    Args:
        rows: what was measured.
        whole: these are all kernels of their architectures: others are no longer shipped, and go. Else they stay.
    """
    import triton

    budget = read()
    kernels: dict[str, dict[str, Any]] = budget["kernels"] if budget["triton"] == triton.__version__ else {}
    found = list(rows)
    for architecture in {str(row.architecture) for row in found} if whole else ():
        kernels[architecture] = {}
    for row in found:
        if row.cost is not None and not row.complaints:
            kernels.setdefault(str(row.architecture), {})[row.kernel] = asdict(row.cost)
    FILE.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=0, sort_keys=True) + "\n")


def read() -> dict[str, Any]:
    """{"triton": version, "kernels": {architecture: {kernel: what it costs}}}."""
    if not FILE.is_file():
        return {"triton": "", "kernels": {}}
    budget: dict[str, Any] = json.loads(FILE.read_text())
    return budget
