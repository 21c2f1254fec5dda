"""Tables of torch.compile on a CPU and of the README, for update_docs.py, from the JSON under benches/results.

<!-- readme -->                   the first table of README.md
<!-- compile MODEL -->            llm_cpu.json, of one of its models
<!-- kernels ISA DTYPE -->        cpu_linear-ISA.json: time of the float matmul over time of the kernel
<!-- decode-attention ISA -->     decode_attention-ISA.json: microseconds of one call
<!-- decode-caches ISA -->        decode_attention-ISA.json: SmolLM2 over each kind of cache
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KERNELS = {
    "W8A8": "int8_linear",
    "W4A8 two-level": "dual_linear",
    "W4A8 groups": "group_linear",
    "W8A16": "int8_float_linear",
    "W4A16": "table_linear",
}


def read(name: str) -> dict[str, Any]:
    """One result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def perplexity_of(recipe: str) -> float:
    """The perplexity of a recipe on the original weights."""
    return next(float(row["perplexity"]) for row in read("perplexity")["rows"] if row["recipe"] == recipe)


def compile_rows(model: str) -> list[tuple[str, float, float, float]]:
    """Of one model in llm_cpu.json: candidate, MB of quantized weights, prefill and decode tokens/s."""
    return [
        (
            r["candidate"],
            r["weight_bytes"] / 1e6,
            r["prefill_tokens_per_second"],
            r["decode_tokens_per_second"],
        )
        for r in read("llm_cpu")[model]
    ]


def compiled(model: str) -> str:
    """One model under Inductor and under qcompile."""
    rows = compile_rows(model)
    prefill, decode = max(r[2] for r in rows if "inductor" in r[0]), max(r[3] for r in rows if "inductor" in r[0])
    lines = [
        "| candidate | quantized weights MB | prefill tokens/s | x best float | decode tokens/s | x best float |",
        "|---|---|---|---|---|---|",
    ]
    for name, size, p, d in rows:
        lines.append(f"| {name} | {size:.0f} | {p:.0f} | {p / prefill:.2f} | {d:.1f} | {d / decode:.2f} |")
    return "\n".join(lines)


def kernels(what: str) -> str:
    """For each number of rows M: the least and the largest speedup over all shapes."""
    isa, dtype = what.split()
    rows = [r for r in read(f"cpu_linear-{isa}")["rows"] if r["dtype"] == dtype]
    lines = [f"| M, {dtype} | {' | '.join(KERNELS)} |", "|---|" + "---|" * len(KERNELS)]
    for m in sorted({r["M"] for r in rows}):
        cells = []
        for kernel in KERNELS.values():
            ratios = [r["float_us"] / r["us"] for r in rows if r["M"] == m and r["kernel"] == kernel]
            cells.append(f"{min(ratios):.1f} - {max(ratios):.1f}")
        lines.append(f"| {m} | {' | '.join(cells)} |")
    return "\n".join(lines)


def readme(_: str) -> str:
    """Size, perplexity and speed against float of the presets that are measured most."""
    lines = [
        "| runtime | model | recipe | MB | perplexity | prefill of 512 | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    models = {"1B shapes, 6 layers": "Llama of 1B shapes, 6 layers, random weights", "SmolLM2-135M": "SmolLM2-135M"}
    for key, model in models.items():
        rows = {name: rest for name, *rest in compile_rows(key)}
        _, prefill, decode = rows["inductor bfloat16"]
        for recipe in ("int8", "w4a8", "w4a16"):
            loss = f"{perplexity_of(recipe):.2f}" if key == "SmolLM2-135M" else "-"
            for runtime, more in (("`torch.compile`", ""), ("`compile_for_generate`", ", decode step")):
                if f"qcompile {recipe} bfloat16{more}" not in rows:  # not measured in this run
                    continue
                size, p, d = rows[f"qcompile {recipe} bfloat16{more}"]
                cells = f"{size:.0f} | {loss} | {p / prefill:.2f}x | {d / decode:.2f}x"
                lines.append(f"| {runtime} | {model} | `{recipe}` | {cells} |")
    lines += onnx_runtime()
    return "\n".join(lines)


def onnx_runtime() -> list[str]:
    """The README's rows of ONNX Runtime: our best folder, and GenAI's int4, against GenAI's float32."""
    engines = read("engines_cpu-vnni")["rows"]
    base = next(r for r in engines if r["engine"].endswith("fp32"))
    folders = read("onnx_cpu-vnni")["rows"]
    lines = []
    for recipe, engine, folder in (
        ("`int4-cpu-gptq`", "qcompile int4-cpu-gptq", "qcompile int4-cpu-gptq"),
        ("GenAI's int4, blocks of 128", "int4", "GenAI int4, block 128"),
    ):
        speed = next(r for r in engines if r["engine"].startswith(engine) or r["engine"].endswith(engine))
        file = next(r for r in folders if r["folder"].endswith(folder))
        ratios = f"{speed['prefill'] / base['prefill']:.2f}x | {speed['decode'] / base['decode']:.2f}x"
        cells = f"{file['megabytes']:.0f} | {file['perplexity']:.2f} | {ratios}"
        lines.append(f"| ONNX Runtime | SmolLM2-135M | {recipe} | {cells} |")
    return lines


def decode_attention(isa: str) -> str:
    """Attention of a token: PyTorch's own, over floats, over codes, and the time that the bytes of the last take."""
    found = {(r["heads"], r["key_heads"], r["tokens"], r["cache"]): r for r in read(f"decode_attention-{isa}")["rows"]}
    lines = [
        "| heads | tokens | PyTorch | bfloat16 | 8 bits | 4 bits | bytes of 16 / 8 / 4 bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for heads, shared, tokens in dict.fromkeys(key[:3] for key in found):
        own = [found[heads, shared, tokens, cache] for cache in ("PyTorch", "bfloat16", "8 bits", "4 bits")]
        cells = " | ".join(f"{r['us']:.0f}" for r in own)
        bounds = " / ".join(f"{r['bytes_us']:.0f}" for r in own[1:])
        lines.append(f"| {heads}, {shared} of keys | {tokens} | {cells} | {bounds} |")
    return "\n".join(lines)


def decode_caches(isa: str) -> str:
    """Tokens a second of a whole model behind contexts of several lengths."""
    rows = read(f"decode_attention-{isa}")["models"]
    contexts = sorted({r["context"] for r in rows})
    lines = [
        f"| cache | {' | '.join(f'behind {c} tokens, tokens/s' for c in contexts)} | MB of {contexts[-1]} tokens |",
        "|---|" + "---|" * (len(contexts) + 1),
    ]
    for name in dict.fromkeys(r["cache"] for r in rows):
        own = {r["context"]: r for r in rows if r["cache"] == name}
        cells = " | ".join(f"{own[c]['rate']:.0f}" for c in contexts)
        lines.append(f"| {name} | {cells} | {own[contexts[-1]]['megabytes']:.0f} |")
    return "\n".join(lines)


TABLES = {
    "readme": readme,
    "compile": compiled,
    "kernels": kernels,
    "decode-attention": decode_attention,
    "decode-caches": decode_caches,
}
