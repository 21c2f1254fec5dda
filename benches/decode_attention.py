"""A decoded token over a float and over a quantized cache: its attention against PyTorch's own, and SmolLM2 as a whole.

    python benches/decode_attention.py        writes benches/results/decode_attention-PROCESSOR.json

One query for each head, caches cold: calls rotate over as many as exceed the last-level cache. Candidates are
interleaved and compared by their medians. "bytes" is the time in which the memory's read bandwidth, measured first,
delivers what a call reads. SmolLM2 is w4a8 under compile_for_generate, interleaved; prompts are read without
compiling.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from roofline import bandwidth

import qcompile
from qcompile.cli.output import print_table
from qcompile.codegen.cpu.native_kernels import load_native_kernels, ops
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import processor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import QuantizeKV
from qcompile.pipeline.find_recipe import find_recipe

RESULTS = Path(__file__).parent / "results" / f"decode_attention-{processor()}.json"
HEADS = {"9 heads, 3 of keys": (9, 3, 64), "32 heads, 8 of keys": (32, 8, 64)}
TOKENS = (256, 512, 2048, 4096)
CACHE, ROUNDS = 96 * 2**20, 60
CONTEXTS, NEW = (256, 2048, 4096), 32
CACHES = {"bfloat16": None, "8 bits": QuantizeKV(8), "4 bits, rotated": QuantizeKV(4, hadamard=True)}

Call = Callable[[], object]


def cases(heads: int, shared: int, width: int, tokens: int) -> tuple[dict[str, Call], dict[str, int]]:
    """One call each over a cache of its own, and the bytes that it reads."""
    query = torch.randn(1, heads, 1, width).bfloat16()
    key, value, new = (torch.randn(1, shared, t, width).bfloat16() for t in (tokens - 1, tokens - 1, 1))
    codes = {
        bits: [
            part
            for x in (key, value)
            for q in [quantize_tensor(x.float(), Format.parse(f"int{bits}/row/zero"))]
            for part in (q.stored(), q.scale.half(), q.zero)
        ]
        for bits in (8, 4)
    }
    whole = torch.cat([key, new], 2), torch.cat([value, new], 2)

    def over_codes(bits: int) -> Call:
        none = (None, None, None, None)
        return lambda: ops.code_attention(query, *none, *codes[bits], new, new, None, 0.125)

    calls: dict[str, Call] = {
        "PyTorch": lambda: torch.nn.functional.scaled_dot_product_attention(query, *whole, enable_gqa=heads != shared),
        "bfloat16": lambda: ops.attention(query, key, value, new, new, None, 0.125),
        "8 bits": over_codes(8),
        "4 bits": over_codes(4),
    }
    read = {f"{bits} bits": sum(part.nbytes for part in parts) for bits, parts in codes.items()}
    return calls, read | dict.fromkeys(("PyTorch", "bfloat16"), key.nbytes + value.nbytes)


def measure(shape: tuple[int, int, int], tokens: int, rate: float) -> list[dict[str, object]]:
    """Medians in microseconds of all candidates."""
    _, read = cases(*shape, tokens)
    count = max(2, CACHE // read["4 bits"] // 4 + 1)  # of caches, each of which has all kinds of keys
    copies = [cases(*shape, tokens)[0] for _ in range(count)]
    times: dict[str, list[float]] = {name: [] for name in read}
    for step in range(max(ROUNDS, count) + 4):
        for name, call in copies[step % count].items():
            start = time.perf_counter()
            call()
            if step >= 4:
                times[name].append(time.perf_counter() - start)
    return [
        dict(heads=shape[0], key_heads=shape[1], width=shape[2], tokens=tokens, cache=name,
             us=statistics.median(found) * 1e6, bytes_us=read[name] / rate * 1e6)
        for name, found in times.items()
    ]  # fmt: skip


def model_with(kv: QuantizeKV | None) -> torch.nn.Module:
    """SmolLM2, w4a8, with its decode step."""
    model, _ = load_pretrained(dtype=torch.bfloat16)
    recipe = find_recipe("w4a8")
    passes = recipe.passes if kv is None else (kv, *recipe.passes)
    qcompile.quantize(model, dataclasses.replace(recipe, passes=passes), verify=False, progress=False)
    report = qcompile.compile_for_generate(model, verify=False, on_slow_kernel="quantize")
    assert report.metrics["decode steps"] == 1, report.breaks
    return model


def whole_models() -> list[dict[str, object]]:
    """Tokens a second behind each context, medians, and the bytes of the cache."""
    rows = list[dict[str, object]]()
    models = {name: model_with(kv) for name, kv in track(CACHES.items(), "compiling", transient=True)}
    for context in CONTEXTS:
        ids, caches, times = torch.randint(3, 40000, (1, context)), dict[str, Any](), dict[str, list[float]]()
        with torch.no_grad():
            for name, model in models.items():
                with torch.compiler.set_stance("force_eager"):
                    caches[name] = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            for step in range(NEW + 2):
                for name, model in models.items():
                    start = time.perf_counter()
                    model(input_ids=ids[:, :1], past_key_values=caches[name], use_cache=True)
                    if step >= 2:
                        times.setdefault(name, []).append(time.perf_counter() - start)
        for name, cache in caches.items():
            held = sum(part.nbytes for layer in cache.layers for part in layer.reserve(0)) / 1e6
            rows.append(dict(context=context, cache=name, rate=1 / statistics.median(times[name]), megabytes=held))
    return rows


def main() -> None:
    """Measure, print, write."""
    load_native_kernels()
    rate, rows = bandwidth(), list[dict[str, object]]()
    for shape in track(HEADS.values(), "timing", transient=True):
        for tokens in TOKENS:
            rows += measure(shape, tokens, rate)
    table = Table("heads", "tokens", "cache", "us", "bytes, us", "times PyTorch", title=f"{rate / 1e9:.1f} GB/s read")
    for row in rows:
        base = next(r for r in rows if r["cache"] == "PyTorch" and all(r[k] == row[k] for k in ("heads", "tokens")))
        speedup = float(str(base["us"])) / float(str(row["us"]))
        figures = (f"{row[k]:.0f}" for k in ("us", "bytes_us"))
        table.add_row(
            f"{row['heads']} / {row['key_heads']}", str(row["tokens"]), str(row["cache"]), *figures, f"{speedup:.1f}x"
        )
    print_table(table)
    models = whole_models()
    table = Table("context", "cache", "tokens/s", "buffers of the cache, MB", title="SmolLM2, w4a8")
    for row in models:
        table.add_row(str(row["context"]), str(row["cache"]), f"{row['rate']:.1f}", f"{row['megabytes']:.1f}")
    print_table(table)
    found = dict(versions=versions(), read_GBs=rate / 1e9, rows=rows, models=models)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
