"""Products and whole models on a GPU against cuBLAS, torch's own kernels and Inductor.

    python benches/gpu.py products                 writes benches/results/gpu_products.json
    python benches/gpu.py model [LAYERS]           writes benches/results/gpu_model.json

products: one layer at a time, cold weights in CUDA graphs, all contenders in turn (codegen/triton/timing.py).
model: Llama-3-8B shapes with random weights, tokens a second of decoding (batches of 1 to 128 over a cache of 1024)
and of a prompt of 2048, against Inductor bf16 with CUDA graphs. Both take minutes, and refuse to run without a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qcompile.bench import versions

RESULTS = Path(__file__).parent / "results"
SHAPES = [(4096, 4096), (4096, 6144), (4096, 14336), (14336, 4096)]  # K x N: o, qkv, gate or up, down
ROWS = [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
RECIPES = ["w4a16", "int8", "fp8"]
BATCHES = [1, 8, 32, 128]
PROMPT, CACHE, ROUNDS = 2048, 1024, 10
WARM, CALLS = 3, 5  # calls that compile and record, and calls of one reading


def model_of(layers: int, device: str, width: int = 4096) -> Any:
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
        with torch.device(device):
            return LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def candidates(model: Any, recipes: list[str]) -> dict[str, Callable[..., Any]]:
    """Inductor first; all with CUDA graphs."""
    found = {"Inductor bf16": torch.compile(model, dynamic=True, options={"triton.cudagraphs": True})}
    for recipe in recipes:
        options = {"recipe": recipe, "inductor": {"triton.cudagraphs": True}}
        found[f"qcompile {recipe}"] = torch.compile(model, backend="qcompile", dynamic=True, options=options)
    return found


def milliseconds(call: Callable[[], Any], rounds: int) -> Callable[[], float]:
    """A reading: the mean of some calls, the device awaited before and after."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def once() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        wait()
        return (time.perf_counter() - start) / rounds * 1e3

    return once


def decoding(model: Any, config: Any, batch: int, device: str) -> Callable[[], Any]:
    """One token for every row, attending over a static cache of CACHE tokens, which every call fills by one."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=CACHE)
    ids = torch.randint(0, 1000, (batch, 1), device=device)
    place = torch.full((batch, 1), CACHE // 2, device=device)

    def step() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, position_ids=place, past_key_values=cache, use_cache=True).logits

    return step


def prompt(model: Any, device: str) -> Callable[[], Any]:
    """A prompt of PROMPT tokens, of which the last gives logits."""
    ids = torch.randint(0, 1000, (1, PROMPT), device=device)

    def step() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return step


def time_model(model: Any, recipes: list[str], device: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Tokens a second of every candidate, in turn; medians over rounds."""
    assert WARM + rounds * CALLS <= CACHE, "the cache would overflow"
    torch._dynamo.config.recompile_limit = 256  # every candidate compiles the same code anew
    models = candidates(model, recipes)
    rows = []
    work = [(f"decode, batch {b}", b, lambda m, b=b: decoding(m, model.config, b, device)) for b in BATCHES]
    work.append((f"prompt of {PROMPT}", PROMPT, lambda m: prompt(m, device)))
    for name, tokens, make in work:
        timers = {}
        for candidate, compiled in models.items():
            call = make(compiled)
            for _ in range(WARM):
                call()
            timers[candidate] = milliseconds(call, CALLS)
        readings: dict[str, list[float]] = {candidate: [] for candidate in models}
        for _ in range(rounds):
            for candidate, once in timers.items():
                readings[candidate].append(once())
        rows.append({"work": name} | {c: tokens / statistics.median(r) * 1e3 for c, r in readings.items()})
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Tokens a second, and how many times Inductor's."""
    names = list(rows[0])[1:]
    table = Table("tokens a second", *names)
    for row in rows:
        table.add_row(row["work"], *(f"{row[n]:.0f} ({row[n] / row[names[0]]:.2f}x)" for n in names))
    return table


def main() -> None:
    """Measure what was asked for, print, write."""
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in ("products", "model"):
        raise SystemExit(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured, and nothing was written")
    console = Console(width=200)
    torch._dynamo.config.recompile_limit = 256  # every candidate compiles the same code anew
    if what == "products":
        from qcompile.codegen.triton.timing import compare

        found = compare(SHAPES, ROWS)
        console.print(found.table())
        found.write(RESULTS / "gpu_products.json")
        return
    layers = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    rows = time_model(model_of(layers, "cuda"), RECIPES, "cuda")
    console.print(table_of(rows))
    machine = versions() | {"gpu": torch.cuda.get_device_name()}
    (RESULTS / "gpu_model.json").write_text(
        json.dumps(dict(machine=machine, layers=layers, rows=rows), indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
