"""What a call of each operator costs the CPU, with Triton's launches recorded by a driver without a GPU.

    python benches/launch_overhead.py             prints a table
    python benches/launch_overhead.py --commit    and writes benches/results/launch_overhead.json

Processor time of one thread, the least of some rounds: what a decoded token pays for every site where no CUDA graph
replays it. `Triton` is the same kernel called as Triton's documentation does, kernel[grid](...), which is the baseline.
The launch itself does nothing here; the driver's part of it is not in the figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qcompile.codegen.triton import triton_ops
from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight, plan_linear_w
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.memory.atomic_file import write_whole
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

RESULTS = Path(__file__).parent / "results"
N = K = 4096
FORM = "int4/group128/zero"
CALLS, ROUNDS = 500, 7
BAR = 10.0  # microseconds of an operator


def microseconds(call: Callable[[], object]) -> float:
    """Processor time of one call: the least of some rounds, as nothing but work makes a round longer."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time() - start) / CALLS)
    return round(1e6 * best, 1)


def on_cpu_tensors() -> None:
    """The operators' CUDA versions for the tensors that there are."""
    library = torch.library.Library("qcompile_triton", "IMPL")
    for op in (triton_ops.linear_w, triton_ops.linear_a8, triton_ops.row_quant):
        library.impl(op.name, op.on_cuda, "CPU", allow_override=True)
    KEPT.append(library)


KEPT: list[torch.library.Library] = []  # a library that is dropped takes its kernels with it


def measure() -> dict[str, float]:
    """Microseconds by name."""
    ops = torch.ops.qcompile_triton
    form = Format.parse(FORM)
    stored, layout = quantize_tensor(torch.randn(N, K), form).stored_parts, layout_of(form)
    assert layout is not None
    weight = PackedWeight(*prepare(*stored, form, K, torch.bfloat16), layout, K)
    packed = weight.packed, weight.scale, weight.zero
    codes, scales = torch.ones(N, K, dtype=torch.int8), torch.rand(N, 1)
    gain, spec = torch.ones(K), str(RowQuant("bf16", first="rms", residual=True))
    found = {}
    for m in (1, 8, 1024):
        x = torch.randn(1, m, K).bfloat16()
        plan = plan_linear_w(x, m, weight, Epilogue())
        launches = 1 if plan is None or plan.sum_k is None else 2
        rest = (None, None, None, None, FORM, K)
        found[f"linear_w, M = {m}, launches {launches}"] = microseconds(lambda: ops.linear_w(x, *packed, *rest))  # noqa: B023
    x8, x_scale = torch.ones(1, 8, K, dtype=torch.int8), torch.rand(1, 8, 1)
    none = (None, None, None, None, torch.bfloat16)
    found["linear_a8, M = 8, launches 2"] = microseconds(lambda: ops.linear_a8(x8, x_scale, codes, scales, *none))
    x = torch.randn(1, 8, K).bfloat16()
    rest = (None, gain, None, None, None, None, None, 1e-6, spec)
    found["row_quant, M = 8, launches 1"] = microseconds(lambda: ops.row_quant(x, x, *rest))
    return found | {"gemm_w by Triton's own launch, M = 1024, launches 1": by_triton(weight)}


def by_triton(weight: PackedWeight) -> float:
    """The launch of gemm_w alone, by Triton's own binder."""
    x = torch.randn(1024, K).bfloat16()
    plan = plan_linear_w(x, 1024, weight, Epilogue())
    assert plan is not None
    call = plan.gemm
    function, out = kernel(call.spec), x.new_empty(1024, N)
    sizes = call.launch.constants(list(function.arg_names))
    arguments = dict(x=x, w=weight.packed, scale=weight.scale, out=out, M=1024, N=N, K=K, blocks=weight.blocks)

    def once() -> None:
        function[call.grid](**arguments, **sizes, ASM=True, num_warps=call.launch.num_warps,
                            num_stages=call.launch.num_stages)  # fmt: skip

    return microseconds(once)


def main() -> None:
    """Measure, print, and write with --commit."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", action="store_true", help="write benches/results/launch_overhead.json")
    commit = parser.parse_args().commit
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "codegen" / "triton"))
    import fake_driver

    fake_driver.install(90, keep=False)
    torch.set_num_threads(1)
    on_cpu_tensors()
    with torch.no_grad():
        found = measure()
    table = Table("operator", f"us of the CPU (asked of an operator: {BAR:g})")
    for name, value in found.items():
        table.add_row(name, f"{value}")
    Console(width=120).print(table)
    if commit:
        versions = dict(torch=torch.__version__, triton=triton.__version__, python=platform.python_version())
        content = dict(versions=versions, bar=BAR, microseconds=found)
        write_whole(RESULTS / "launch_overhead.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
