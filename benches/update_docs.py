"""Write the tables in docs/ and README.md from the JSON under benches/results.

    python benches/update_docs.py

A table stands between a line that names it, and <!-- end -->; ISA is vnni or avx2:
    <!-- table NAME -->                all rows of NAME.json, a comparison of recipes
    <!-- recipes NAME NAME .. -->      those recipes on the model and on its rotated copy
    <!-- prefixes -->                  intact_kv.json
    <!-- costs -->                     quantize_cost.json
    <!-- streamed -->                  streamed_memory.json
    <!-- onnx ISA -->, long, roofline, few-tokens   onnx_cpu-ISA.json
    <!-- shapes ISA -->                onnx_shapes-ISA.json
    <!-- pieces ISA -->                onnx_long_prompts-ISA.json
    <!-- encoder ISA -->               onnx_encoder-ISA.json
    <!-- engines ISA -->               engines_cpu-ISA.json
    <!-- kv-scales -->                 static_kv_scales.json
    <!-- w4a8 -->                      w4a8_formats.json
    others: compile_tables.py, q_galore_tables.py, qa_lora_tables.py, int4_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import architecture_tables
import compile_tables
import int4_tables
import mutation_tables
import q_galore_tables
import qa_lora_tables
from compile_tables import RESULTS, read

ROOT = Path(__file__).parents[1]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of one result file; none if it is not there."""
    return list(read(name)["rows"]) if (RESULTS / f"{name}.json").is_file() else []


def rounded(value: float) -> str:
    """A perplexity, short."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def accuracy(name: str) -> str:
    """All of one comparison: float first, then by bytes and perplexity."""
    rows = sorted(rows_of(name), key=lambda r: (r["recipe"] != "float", r["site_bytes"] // 5_000_000, r["perplexity"]))
    lines = ["| recipe | perplexity | KL to float | same top-1 | quantized weights MB |", "|---|---|---|---|---|"]
    for r in rows:
        size = f"{r['site_bytes'] / 1e6:.0f}" if r["site_bytes"] else ""
        lines.append(
            f"| `{r['recipe']}` | {rounded(r['perplexity'])} | {r['kl']:.4f} | {r['agreement']:.1%} | {size} |"
        )
    return "\n".join(lines)


def chosen(names: str) -> str:
    """Some recipes on both models, without those that were measured on neither."""
    found = [{r["recipe"]: r["perplexity"] for r in rows_of(name)} for name in ("perplexity", "perplexity-rotated")]
    lines = ["| WikiText-2 perplexity | original weights | rotated copy |", "|---|---|---|"]
    for name in ["float", *names.split()]:
        cells = [rounded(of[name]) if name in of else "" for of in found]
        if any(cells):
            lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def prefixes(_: str) -> str:
    """What IntactKV does."""
    lines = ["| windows that begin with the model's first token | perplexity | KL to float |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| `{r['recipe']}` | {r['perplexity']:.2f} | {r['kl']:.4f} |" for r in rows_of("intact_kv"))]
    )


def costs(_: str) -> str:
    """What quantizing takes."""
    lines = ["| recipe | on a processor with | seconds | peak / float weights |", "|---|---|---|---|"]
    rows = rows_of("quantize_cost")
    cells = (f"| `{r['recipe']}` | {r['isa']} | {r['seconds']:.1f} | {r['ratio']:.2f} |" for r in rows)
    return "\n".join([*lines, *cells])


def streamed(_: str) -> str:
    """Peak memory of quantizing in memory and in parts."""
    head = "| model | GB of weights | recipe | way | peak MB | bar MB | process MB | planned MB | seconds |"
    lines = [head, "|---" * 9 + "|"]
    for r in rows_of("streamed_memory"):
        way = "in parts" if r["streamed"] else "in memory"
        way += f", at most {r['limit'] / 1e9:.0f} GB of addresses" if r["limit"] else ""
        way += f", {r['processes']} processes" if r.get("processes", 1) > 1 else ""
        planned = f"{r['planned'] / 1e6:.0f}" if r["planned"] else ""
        cells = " | ".join(f"{r[key] / 1e6:.0f}" for key in ("peak", "bar", "process"))
        lines.append(
            f"| {r['model']} | {r['weights'] / 1e9:.2f} | `{r['recipe']}` | {way} | {cells} | {planned} "
            f"| {'' if r['seconds'] is None else round(r['seconds'])} |"
        )
    return "\n".join(lines)


def onnx(isa: str, name: str = "onnx_cpu") -> str:
    """ONNX folders of ours and of onnxruntime-genai's model builder, on one kind of processor."""
    head = "| folder | prefill of 512, tokens/s | decode, tokens/s | file MB | open MB | perplexity |"
    return "\n".join(
        [head, "|---|---|---|---|---|---|"]
        + [
            f"| {r['folder']} | {r['prefill']:.0f} | {r['decode']:.1f} | {r['megabytes']:.1f} "
            f"| {r['memory_megabytes']:.0f} | {rounded(r['perplexity']) if 'perplexity' in r else ''} |"
            for r in rows_of(f"{name}-{isa}" if isa else name)
        ]
    )


def onnx_shapes(isa: str) -> str:
    """The same of random weights, which have no perplexity."""
    return "\n".join(line.rpartition("|")[0].rpartition("|")[0] + "|" for line in onnx(isa, "onnx_shapes").split("\n"))


def onnx_long(isa: str) -> str:
    """The same with long prompts."""
    rows = [r for r in rows_of(f"onnx_cpu-{isa}") if r["long"]]
    lengths = list(rows[0]["long"])
    head = [f"| folder | {' | '.join(f'{n} tokens, s to the first new one | decode' for n in lengths)} |"]
    head.append("|---" * (1 + 2 * len(lengths)) + "|")
    cells = [" | ".join(f"{a['first']:.2f} | {a['decode']:.0f}" for a in r["long"].values()) for r in rows]
    return "\n".join([*head, *(f"| {r['folder']} | {cell} |" for r, cell in zip(rows, cells, strict=True))])


def onnx_few_tokens(isa: str) -> str:
    """The number of tokens from which int8 weights are faster than 4-bit codes."""
    rows = read(f"onnx_cpu-{isa}")["few_tokens"]
    lines = [f"| tokens after a cache of 256 | {' | '.join(str(r['tokens']) for r in rows)} |"]
    lines.append("|---" * (1 + len(rows)) + "|")
    for branch, name in (("codes", "4-bit codes, ms"), ("int8", "int8, ms")):
        lines.append(f"| {name} | {' | '.join(f'{r[branch]:.1f}' for r in rows)} |")
    return "\n".join(lines)


def roofline(isa: str) -> str:
    """Decode as a share of reading the file once per token, prefill as a share of the int8 multiply-add rate."""
    found = read(f"onnx_cpu-{isa}")
    rate = max(found["int8_rates"].values()) / 1e9
    head = f"decode, of {found['bandwidth'] / 1e9:.0f} GB/s | prefill, of {rate:.0f} G multiply-adds/s"
    return "\n".join(
        [f"| folder | {head} |", "|---|---|---|"]
        + [f"| {r['folder']} | {r['share_of_bandwidth']:.0%} | {r['share_of_int8']:.0%} |" for r in found["rows"]]
    )


def onnx_pieces(isa: str) -> str:
    """Attention over a prompt at once and in pieces."""
    rows = rows_of(f"onnx_long_prompts-{isa}")
    names = list(rows[0]["milliseconds"])
    head = f"| new tokens | past | {' | '.join(f'{name}, ms' for name in names)} |"
    lines = []
    for row in rows:
        times = " | ".join(f"{row['milliseconds'][name]:.2f}" for name in names)
        lines.append(f"| {row['new']} | {row['past']} | {times} |")
    return "\n".join([head, "|---|---|" + "---|" * len(names), *lines])


def onnx_encoder(isa: str) -> str:
    """Sentence embeddings of ONNX folders."""
    head = "| folder | file MB | mean cosine similarity to float | least | sentences/s | x float |"
    rows = rows_of(f"onnx_encoder-{isa}")
    return "\n".join(
        [head, "|---|---|---|---|---|---|"]
        + [
            f"| {r['folder']} | {r['megabytes']:.1f} | {r['mean']:.4f} | {r['least']:.4f} "
            f"| {r['rate']:.0f} | {r['rate'] / rows[0]['rate']:.2f} |"
            for r in rows
        ]
    )


def engines(isa: str) -> str:
    """Other engines on the same model."""
    lines = ["| engine | prefill of 512, tokens/s | decode, tokens/s | open MB |", "|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {r['engine']} | {r['prefill']:.0f} | {r['decode']:.1f} | {r['memory_megabytes']:.0f} |"
            for r in rows_of(f"engines_cpu-{isa}")
        ]
    )


def kv_scales(_: str) -> str:
    """Static scales of a KV cache by the peak that they cover."""
    rows = {(r["bits"], r["peak"]): rounded(r["perplexity"]) for r in rows_of("static_kv_scales")}
    peaks = {"channel": "max \\|a\\| of the channel", "pair": "of its pair", "tensor": "of all channels"}
    lines = [f"| float: {rows[32, '']}; peak | 8 bits | 4 bits |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {text} | {rows[8, peak]} | {rows[4, peak]} |" for peak, text in peaks.items())])


def w4a8(_: str) -> str:
    """Block sizes and bases of W4A8."""
    lines = ["| basis | blocks of layers | of logits | MB of codes and scales | perplexity |", "|---|---|---|---|---|"]
    for r in rows_of("w4a8_formats"):
        size = f"{r['megabytes']:.1f}" if "megabytes" in r else ""
        lines.append(
            f"| {r['basis']} | {r.get('layers', '')} | {r.get('logits', '')} | {size} | {rounded(r['perplexity'])} |"
        )
    return "\n".join(lines)


TABLES = {
    "table": accuracy,
    "recipes": chosen,
    "prefixes": prefixes,
    "costs": costs,
    "streamed": streamed,
    "onnx": onnx,
    "long": onnx_long,
    "roofline": roofline,
    "shapes": onnx_shapes,
    "few-tokens": onnx_few_tokens,
    "encoder": onnx_encoder,
    "pieces": onnx_pieces,
    "engines": engines,
    "kv-scales": kv_scales,
    "w4a8": w4a8,
    **compile_tables.TABLES,
    **architecture_tables.TABLES,
    **mutation_tables.TABLES,
    **q_galore_tables.TABLES,
    **qa_lora_tables.TABLES,
    **int4_tables.TABLES,
}


def updated(text: str) -> str:
    """A page with its tables as the JSON has them."""
    return re.sub(
        rf"(<!-- ({'|'.join(TABLES)})((?: [^\n]*?)?) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{TABLES[m[2]](m[3].strip())}\n{m[4]}",
        text,
        flags=re.S,
    )


def main() -> None:
    """Rewrite every table in place."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        if (new := updated(text)) != text:
            page.write_text(new)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
