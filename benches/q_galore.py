"""Q-GaLore: validation loss, bytes and step time beside AdamW, GaLore and the authors' code, on a small decoder.

    python benches/q_galore.py [kind ..] [--reference DIR] [--steps 200] [--seeds 0 ..] [--only losses|times|memory]

writes benches/results/q_galore.json. The model has 4 layers and reads bytes of Python's own documentation. DIR is a
checkout of VITA-Group/Q-GaLore; peers that are not installed are skipped and named. Rows of other kinds and seeds stay.
Times are medians of interleaved steps without a new basis, so that only their ratios count; those of compiled steps are
at hidden size 512. Peaks of memory are of processes of their own (q_galore_memory.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import q_galore_memory
import torch
from q_galore_variants import KINDS, Variant, batch, build, one_step, rate
from rich.table import Table

from qcompile.cli.output import print_table
from qcompile.evaluation.throughput import allow_recompiles
from qcompile.memory.environment import versions
from qcompile.numerics.low_rank import is_left, project

RESULTS = Path(__file__).parent / "results" / "q_galore.json"
PEERS = ("bitsandbytes", "galore-torch", "q-galore-torch")


def train(variant: Variant, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train, and measure the loss and the memory."""
    for step in range(steps):
        for group in variant.optimizer.param_groups:
            group["lr"] = rate(step, steps, lr)
        one_step(variant, step + 1000 * seed)
    sizes = variant.sizes()
    return dict(loss=evaluate(variant), bytes=sizes, total=sum(sizes.values()), svd=variant.decompositions())


@torch.no_grad()
def evaluate(variant: Variant) -> float:
    """Nats a byte of held-out text."""
    variant.model.eval()
    batches = [batch(10**6 + index, 8, held_out=True) for index in range(12)]
    losses = [float(variant.model(input_ids=ids, labels=ids).loss) for ids in batches]
    variant.model.train()
    return statistics.mean(losses)


def interleaved(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, all of them once in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def step_times(hidden: int, backend: str, kinds: list[str], reference: str | None, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of each kind, compiled by a backend, or not ("")."""
    calls = {}
    allow_recompiles()  # all variants are models of one class
    for kind in kinds:
        try:
            variant = build(kind, 0.001, hidden, reference)
        except ImportError:
            continue
        forward = torch.compile(variant.model, backend=backend) if backend else variant.model
        one_step(variant, 0, forward)  # finds the first basis, and compiles
        calls[kind] = lambda variant=variant, forward=forward: one_step(variant, 1, forward)
    return interleaved(calls, rounds)


def weight_gradients(rounds: int) -> list[dict[str, Any]]:
    """Law P: the projected gradient of a weight, before the product and behind it, for r = K / 4."""
    rows = []
    for tokens, n, k in ((1024, 1536, 576), (1024, 576, 1536), (2048, 1024, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            x, g = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype)
            left, side = is_left(n, k), min(n, k)
            basis = torch.linalg.qr(torch.randn(side, side // 4))[0].t().contiguous().to(dtype)
            calls = {
                "behind": lambda: basis @ (g.t() @ x) if left else (g.t() @ x) @ basis.t(),  # noqa: B023
                "before": lambda: project(x, g, basis, left),  # noqa: B023
            }
            times = interleaved(calls, rounds)
            row = dict(tokens=tokens, N=n, K=k, rank=side // 4, dtype=str(dtype).removeprefix("torch."))
            rows.append(row | times | dict(ratio=times["before"] / times["behind"]))
    return rows


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--reference", help="a checkout of VITA-Group/Q-GaLore")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", choices=["losses", "times", "memory"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"losses": {}, "missing": {}}
    for kind in options.kinds if options.only in (None, "losses") else []:
        for seed in options.seeds:
            try:
                variant = build(kind, KINDS[kind], reference=options.reference, seed=seed)
            except ImportError as error:
                result["missing"][kind] = str(error)
                break
            row = train(variant, options.steps, KINDS[kind], seed)
            losses = {**result["losses"].get(kind, {}).get("losses", {}), str(seed): row.pop("loss")}
            found = dict(
                lr=KINDS[kind], steps=options.steps, losses=losses, loss=statistics.mean(losses.values()), **row
            )
            result["losses"][kind] = found
            print(kind, json.dumps(found), flush=True)
            write(result)
    for kind in options.kinds if options.only in (None, "memory") else []:
        if kind in q_galore_memory.KINDS:
            try:
                row = q_galore_memory.in_own_processes(kind, reference=options.reference)
            except ImportError as error:
                result["missing"][kind] = str(error)
                continue
            result["memory"] = {**result.get("memory", {}), kind: row}
            print(kind, json.dumps(row), flush=True)
            write(result, "memory_versions")
    if options.only in (None, "times"):
        kinds = ["adamw", "bitsandbytes", "reference", "ours", "ours-galore"]
        result["eager_ms"] = {"128": step_times(128, "", kinds, options.reference, 15)}
        kinds = ["adamw", "reference", "ours", "ours-galore"]
        result["eager_ms"]["512"] = step_times(512, "", kinds, options.reference, 5)
        write(result)
        result["compiled_ms"] = {"512": step_times(512, "inductor", kinds, options.reference, 7)}
        kinds = ["adamw", "ours", "ours-galore"]  # the reference's layers are no operators of ours
        # Last: it builds C++ kernels for folds, which all that runs later in this process uses.
        result["qcompile_ms"] = {"512": step_times(512, "qcompile", kinds, None, 7)}
        result["weight_gradient"] = weight_gradients(9)
        write(result)
    show(result)


def write(result: dict[str, Any], key: str = "versions") -> None:
    """Write what there is, with the versions and the processor of now: those of peaks by a key of their own."""
    found = versions()
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    result[key] = found
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def show(result: dict[str, Any]) -> None:
    """The table of losses and bytes."""
    table = Table("variant", "lr", "nats a byte", "KB", "of AdamW", "bases")
    whole = result["losses"].get("adamw", {}).get("total")
    for kind, row in result["losses"].items():
        share = f"{row['total'] / whole:.2f}" if whole else ""
        table.add_row(kind, str(row["lr"]), f"{row['loss']:.3f}", f"{row['total'] / 1e3:.0f}", share, str(row["svd"]))
    print_table(table)


if __name__ == "__main__":
    main()
