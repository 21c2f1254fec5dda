"""Times that the kernels are predicted to take on a GPU that is not here, from their machine code.

    python benches/gpu_model.py             prints the table
    python benches/gpu_model.py --commit    and writes benches/results/gpu_predicted.json

A trip of a kernel's main loop multiplies 128 columns. It takes as long as the slowest of: starting its instructions,
the pipe of integers, the tensor cores, the bytes of both tiles through the second cache, and the bytes of the weights
from memory; a program that is alone on its multiprocessor waits for memory too. Instructions are those of
codegen/triton/aot/budget.json (sm_90), counted in what ptxas made; rates are data sheets' and one measured bandwidth of
each card; cuBLAS is predicted by its bytes and 700 TFLOP/s. **Nothing here is measured on a GPU.** Where
benches/results/gpu_products.json is (benches/gpu.py writes it), the measured ratio stands beside the predicted one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.main_loop import LoopCost
from qcompile.codegen.triton.aot.shipped_kernels import ShippedKernel
from qcompile.codegen.triton.kernels.group_spec import GemmFp4Fp8, GemmGroup
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8
from qcompile.codegen.triton.launch.split_k import CACHE_BYTES, CLOCK, MULTIPLY_ADDS, SECOND_KERNEL, WAIT, split_k_of
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, place_scales, tiles_of
from qcompile.memory.atomic_file import write_whole

RESULTS = Path(__file__).parent / "results"
CARDS = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second from memory: published copies
MULTIPROCESSORS = 132
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]  # K x N of Llama-3-8B: o; gate or up; down
ROWS = [1, 16, 32, 64, 128, 256, 512, 1024]
FIXED = 2.7e-6  # seconds of a kernel in a CUDA graph: launch, start and end
INT4 = GemmW("bf16", zero="int", paired=True)
Gemm = GemmW | Gemm8 | GemmW4A8 | GemmGroup
KERNELS: dict[str, tuple[Gemm, int, int]] = {  # spec, bits of a weight, bytes of a value of x
    "w4a16": (INT4, 4, 2),
    "w4a8": (GemmW4A8(), 4, 1),
    "int8": (Gemm8("bf16", "int8"), 8, 1),
    "fp8": (Gemm8("bf16", "fp8"), 8, 1),
    "w4a4": (GemmGroup(zero=True), 4, 1),
    "w4a4-rrs": (GemmGroup(zero=True, act="group"), 4, 1),
    "fp4-fp8": (GemmFp4Fp8(), 4, 1),
}
BARS = {  # of the predicted ratio on an H100: M up to, square, wide
    "w4a16": [(16, 1.9, 2.6), (32, 1.7, 2.3), (64, 1.4, 1.9), (128, 1.0, 1.2), (1024, 0.8, 0.8)],
    "int8": [(256, 1.3, 1.3)],
    "fp8": [(256, 1.3, 1.3)],
}


@dataclass(frozen=True)
class Prediction:
    """One GEMM.

    Attributes:
        seconds: with its second kernel.
        bound: what a trip of the loop waits for.
        split_k: ranges of K.
    """

    seconds: float
    bound: str
    split_k: int


def counted(spec: Gemm, launch: Launch) -> tuple[LoopCost, int]:
    """The main loop on sm_90 as the budget has it, and programs that share a multiprocessor."""
    kernel = str(ShippedKernel(spec, launch))
    cost = read()["kernels"]["90"][kernel]
    return LoopCost(sum(cost["loop"].values()), cost["loop"], launch.num_warps), cost["together"]


def predicted(name: str, m: int, k: int, n: int, bandwidth: float) -> Prediction:
    """The time of x [M, K] times a weight [N, K].

    Args:
        name: of KERNELS.
        m: rows of x.
        k: input channels.
        n: output channels.
        bandwidth: bytes a second from memory.
    """
    spec, bits, x_bytes = KERNELS[name]
    spec = place_scales(spec, m) if isinstance(spec, GemmW) else spec
    launch = launch_of(spec, m)
    loop, most = counted(spec, launch)
    steps = -(-k // 128)
    split = split_k_of(m, n, steps, bits, x_bytes, launch, MULTIPROCESSORS)
    programs, rows_of_tiles = tiles_of(m, n, launch) * split, -(-m // launch.block_m)
    waves = -(-programs // (MULTIPROCESSORS * most))
    together = -(-programs // (MULTIPROCESSORS * waves))
    scales = 0 if bits == 8 else 8 if isinstance(spec, GemmGroup) and spec.zero else 4  # bytes of a group
    weights = launch.block_n * (128 * bits / 8 + scales)
    tensor = launch.block_m * launch.block_n * 128 / MULTIPLY_ADDS[x_bytes]
    cycles = {
        "issue": together * loop.issue,
        "integers": together * loop.alu,
        "tensor cores": together * tensor * (1.1 if x_bytes == 2 else 1.0),
        "second cache": together * (weights + launch.block_m * 128 * x_bytes) / CACHE_BYTES,
        "memory": weights / rows_of_tiles * min(programs, MULTIPROCESSORS * together) * CLOCK / bandwidth,
        "waiting": WAIT + tensor + loop.issue / 2 if together == 1 else 0.0,
    }
    bound = max(cycles, key=cycles.__getitem__)
    seconds = FIXED + waves * -(-steps // split) * cycles[bound] / CLOCK
    if split > 1:
        seconds += SECOND_KERNEL + 8 * split * m * n / (CACHE_BYTES * MULTIPROCESSORS * CLOCK)
    return Prediction(seconds, bound, split)


def cublas(m: int, k: int, n: int, bandwidth: float) -> float:
    """Seconds of cuBLAS in bfloat16: its bytes at 92 % of the bandwidth, or 700 TFLOP/s."""
    return 2.5e-6 + max(2 * n * k / (0.92 * bandwidth), 2 * m * n * k / 700e12)


def bar(name: str, m: int, wide: bool) -> float | None:
    """The ratio that is asked for; None where none is."""
    return next(((two if wide else one) for most, one, two in BARS.get(name, []) if m <= most), None)


def rows() -> list[dict[str, Any]]:
    """Every card, shape, M and kernel."""
    found = []
    for card, bandwidth in CARDS.items():
        for (k, n), m in ((shape, m) for shape in SHAPES for m in ROWS):
            baseline = cublas(m, k, n, bandwidth)
            for name in KERNELS:
                one = predicted(name, m, k, n, bandwidth)
                found.append(
                    dict(card=card, k=k, n=n, m=m, kernel=name, microseconds=round(1e6 * one.seconds, 2),
                         times_cublas=round(baseline / one.seconds, 2), bound=one.bound, split_k=one.split_k,
                         bar=bar(name, m, max(k, n) > 4096) if card == "H100" else None)
                )  # fmt: skip
    return found


def measured() -> dict[tuple[int, int, int, str], float]:
    """(K, N, M, kernel) -> times cuBLAS, as benches/gpu.py measured it; nothing where it was not."""
    path = RESULTS / "gpu_products.json"
    if not path.is_file():
        return {}
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        times = row["times"]
        for name in KERNELS:
            ours, base = times.get(f"qcompile {name}"), times.get("cuBLAS bf16")
            if ours and base:
                found[row["k"], row["n"], row["m"], name] = base["microseconds"] / ours["microseconds"]
    return found


def table_of(found: list[dict[str, Any]]) -> Table:
    """Predicted ratios, red below their bar; measured ones behind them where there are any."""
    known = measured()
    table = Table("card", "K x N", "M", *KERNELS, title="times cuBLAS bf16: predicted from machine code, not measured")
    by_row: dict[tuple[str, int, int, int], list[str]] = {}
    for row in found:
        color = "" if row["bar"] is None else "green" if row["times_cublas"] >= row["bar"] else "red"
        text = f"{row['times_cublas']:.2f}" + (f" (asked {row['bar']})" if row["bar"] else "")
        ratio = known.get((row["k"], row["n"], row["m"], row["kernel"]))
        text = f"[{color}]{text}[/]" if color else text
        text += f", {row['bound']}" + (f"; measured {ratio:.2f}" if ratio else "")
        by_row.setdefault((row["card"], row["k"], row["n"], row["m"]), []).append(text)
    for (card, k, n, m), cells in by_row.items():
        table.add_row(card, f"{k} x {n}", str(m), *cells)
    return table


def main() -> None:
    """Print, and write with --commit."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", action="store_true", help="write benches/results/gpu_predicted.json")
    commit, found = parser.parse_args().commit, rows()
    Console(width=160).print(table_of(found))
    missed = [row for row in found if row["bar"] and row["times_cublas"] < row["bar"]]
    print(f"{len(missed)} of {sum(bool(row['bar']) for row in found)} bars are missed")
    if commit:
        versions = dict(triton=triton.__version__, torch=torch.__version__)
        write_whole(RESULTS / "gpu_predicted.json", json.dumps(dict(versions=versions, rows=found), indent=1) + "\n")


if __name__ == "__main__":
    main()
