"""GEMMs and whole models on a GPU against cuBLAS, torch's own kernels, GemLite and Inductor.

    python benches/gpu.py                          both, in under eight minutes
    python benches/gpu.py products                 writes benches/results/gpu_products.json
    python benches/gpu.py model [LAYERS]           writes benches/results/gpu_model.json

products: one layer at a time, cold weights in CUDA graphs, interleaved (codegen/triton/tuning/gemm_benchmark.py).
model: Llama-3-8B shapes with random weights, tokens a second of decoding (batches of 1 to 64 over a cache of 1024)
and of a prompt of 2048, against Inductor bf16 with CUDA graphs; the most telling first. What is measured is written
after every row, so an interruption loses nothing, and what the time did not suffice for is named. Both end with their
targets (gpu_targets.py), and refuse to run without a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_targets
import torch
from rich.console import Console
from rich.table import Table

import qcompile.backend
from qcompile.codegen.triton.tuning.gemm_benchmark import GemmComparison, Timed, compare_gemms, interleaved, ratio
from qcompile.codegen.triton.tuning.gpu_timer import TimedGpu

RESULTS = Path(__file__).parent / "results"
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]  # K x N: o, gate or up, down
ROWS = [1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
RECIPES = ["w4a16", "int8", "fp8", "auto"]
INDUCTOR = "Inductor bf16"  # the baseline of all ratios
WORK = [("decode", 1), ("prompt", 2048), ("decode", 8), ("decode", 32), ("decode", 64)]  # the most telling first
CACHE, ROUNDS = 1024, 10
WARMUP_CALLS, CALLS = 3, 5  # calls that compile and record, and calls of one reading
SECONDS = dict(products=170, model=270)  # after so many no row begins


def model_of(layers: int, device: torch.device, width: int = 4096) -> Any:
    """Llama-3-8B shapes (or of another width), random bf16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 512), max_position_embeddings=8192,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def candidates(model: Any, recipes: list[str], device: torch.device) -> dict[str, Callable[..., Any]]:
    """name -> compiled model, Inductor first; on a GPU with CUDA graphs. "auto" is the recipe that it chooses, once."""
    from qcompile.pipeline.find_recipe import find_recipe

    on_gpu = device.type == "cuda"
    models = {INDUCTOR: torch.compile(model, dynamic=True, mode="reduce-overhead" if on_gpu else "default")}
    chosen = {name: find_recipe(name, model).name for name in recipes}
    for recipe in dict.fromkeys(chosen.values()):
        options = {"recipe": recipe, "verify": False, "mode": "reduce-overhead" if on_gpu else "default"}
        label = f"qcompile {recipe}" + " (auto)" * (chosen.get("auto") == recipe and recipe not in recipes)
        # The function, not its name: a checkout that was not installed has no entry point.
        models[label] = torch.compile(model, backend=qcompile.backend.qcompile, dynamic=True, options=options)
    return models


def microseconds(call: Callable[[], Any], calls: int, device: torch.device) -> Callable[[], float]:
    """A reading: the mean of some calls, with the device synchronized before and after."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def once() -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - start) / calls * 1e6

    return once


def decoding(model: Any, config: Any, batch: int, device: torch.device) -> Callable[[], Any]:
    """One token for every row, attending over a static cache of CACHE tokens, which every call fills by one."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=CACHE)
    heads, width = config.num_key_value_heads, config.head_dim
    # Filled now, outside of what is compiled: else Inductor meets inputs that change, and makes no CUDA graph.
    cache.early_initialization(batch, heads, width, next(model.parameters()).dtype, device)
    ids = torch.randint(0, 100, (batch, 1), device=device)
    position = torch.full((batch, 1), CACHE // 2, device=device)

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True).logits

    return step


def prompt(model: Any, tokens: int, device: torch.device) -> Callable[[], Any]:
    """A prompt of so many tokens, of which the last gives logits."""
    ids = torch.randint(0, 100, (1, tokens), device=device)

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return step


def time_model(
    model: Any,
    recipes: list[str],
    device: torch.device,
    rounds: int = ROUNDS,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    seconds: float = float("inf"),
) -> list[dict[str, Any]]:
    """Microseconds of a call of every candidate, interleaved.

    Args:
        model: to compile.
        recipes: one candidate each, beside Inductor.
        device: of the model.
        rounds: readings of each.
        keep: is given all rows after every one.
        seconds: no row begins after so many, nor another candidate of one: each compiles for most of a minute.
    """
    assert WARMUP_CALLS + (rounds + 1) * CALLS <= CACHE, "the cache would overflow"
    torch._dynamo.config.recompile_limit = 256  # every candidate compiles the same code anew
    start, models = time.monotonic(), candidates(model, recipes, device)
    rows: list[dict[str, Any]] = []
    for kind, tokens in WORK:
        name = f"decode, batch {tokens}" if kind == "decode" else f"prompt of {tokens}"
        row: dict[str, Any] = dict(work=name, tokens=tokens, times={}, absent={}, peak_bytes={})
        rows.append(row)
        if time.monotonic() - start > seconds:
            row["absent"] = dict.fromkeys(models, "out of time")
            continue
        timers = {}
        for candidate, compiled in models.items():
            on_gpu = device.type == "cuda"
            if timers and time.monotonic() - start > seconds:
                row["absent"][candidate] = "out of time"
                continue
            try:
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                call = (
                    decoding(compiled, model.config, tokens, device) if kind == "decode"
                    else prompt(compiled, tokens, device)
                )  # fmt: skip
                for _ in range(WARMUP_CALLS):
                    call()
                if on_gpu:
                    row["peak_bytes"][candidate] = torch.cuda.max_memory_allocated()
                timers[candidate] = (microseconds(call, CALLS, device), 0)
            except Exception as error:  # one that fails stops no other
                line = (str(error).strip().splitlines() or [""])[0]
                row["absent"][candidate] = f"{type(error).__name__}: {line[:300]}"
        row["times"] = interleaved(timers, rounds)
        keep(rows)
    return rows


def times_inductor(row: dict[str, Any], name: str) -> float | None:
    """How many times Inductor's speed; None where it cannot be said."""
    baseline: Timed | None = row["times"].get(INDUCTOR)
    return None if baseline is None else ratio(row["times"][name], baseline)


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Tokens a second, and how many times Inductor's ("?" where the GPU was not quiet)."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["times"], *row["absent"])))
    table = Table("tokens a second", *names)
    for row in rows:
        cells = []
        for name in names:
            timed, times = row["times"].get(name), times_inductor(row, name) if name in row["times"] else None
            word = "?" if times is None else f"{times:.2f}x"
            cells.append("-" if timed is None else f"{row['tokens'] / timed.microseconds * 1e6:.0f} ({word})")
        table.add_row(row["work"], *cells)
    return table


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1, default=vars) + "\n")
    os.replace(beside, path)


def run_products(console: Console, timed_gpu: TimedGpu, folder: Path) -> None:
    """All GEMMs on all shapes."""

    def keep(found: GemmComparison) -> None:
        found.write(folder / "gpu_products.json")

    found = compare_gemms(SHAPES, ROWS, timed_gpu=timed_gpu, keep=keep, seconds=SECONDS["products"])
    console.print(found.table())
    for note in found.notes():
        console.print(note, highlight=False)
    console.print(gpu_targets.gemm_table(found))


def run_model(console: Console, timed_gpu: TimedGpu, folder: Path, layers: int, width: int = 4096) -> None:
    """All recipes on the whole model."""
    before, device = timed_gpu.state(), timed_gpu.device

    def keep(rows: list[dict[str, Any]]) -> None:
        found = dict(before=before, after=timed_gpu.state(), layers=layers, rows=rows, kernels=kernels_of_last())
        write(folder / "gpu_model.json", found)

    rows = time_model(model_of(layers, device, width), RECIPES, device, keep=keep, seconds=SECONDS["model"])
    keep(rows)
    console.print(table_of(rows))
    for row in rows:
        for name, why in row["absent"].items():
            console.print(f"{row['work']}, {name}: {why}", highlight=False)
    console.print(gpu_targets.model_table(rows, times_inductor))


def kernels_of_last() -> list[dict[str, Any]]:
    """Of every graph that the backend compiled: its recipe, bytes, and how many sites have which kernel."""
    from collections import Counter

    from qcompile.backend import dynamo as backend

    found = []
    for report in backend.reports:
        kernels = Counter(k for site in report.sites for k in (site.kernel.values() or [site.reason]))
        found.append(dict(recipe=report.recipe, bytes_after=report.bytes_after, kernels=dict(kernels)))
    return found


def main() -> None:
    """Measure, print, write."""
    part = sys.argv[1] if len(sys.argv) > 1 else "all"
    if part not in ("all", "products", "model"):
        raise SystemExit(__doc__)
    console, timed_gpu = Console(width=240), TimedGpu()
    if not timed_gpu.available:
        raise SystemExit("no GPU here: nothing was measured, and nothing was written")
    if part != "model":
        run_products(console, timed_gpu, RESULTS)
    if part != "products":
        run_model(console, timed_gpu, RESULTS, int(sys.argv[2]) if len(sys.argv) > 2 else 8)


if __name__ == "__main__":
    main()
