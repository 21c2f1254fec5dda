"""Put the measured numbers into the pages under docs/, from the JSON under benches/results.

    python benches/write_tables.py

A table stands between a line that says which, and <!-- end -->:
    <!-- table NAME -->                all rows of benches/results/NAME.json, in docs/results.md
    <!-- recipes NAME NAME .. -->      those recipes as the model is and on its rotated twin
    <!-- prefixes -->                  intact_kv.json
    <!-- costs -->                     quantize_cost.json
    <!-- onnx HOW -->, long, few, roofline   onnx_cpu-HOW.json, of one kind of processor
    <!-- shapes vnni -->               onnx_shapes-vnni.json
    <!-- pieces HOW -->                onnx_long_prompts-HOW.json
    <!-- encoder HOW -->               onnx_encoder-HOW.json
    <!-- engines HOW -->               engines_cpu-HOW.json
    <!-- fixed -->                     fixed_scales.json
    <!-- w4a8 -->                      w4a8_formats.json
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of one result file; none if it is not there."""
    path = ROOT / "benches" / "results" / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def number(value: float) -> str:
    """A perplexity."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def accuracy(name: str) -> str:
    """All of one comparison: float first, then by bytes and perplexity."""
    rows = sorted(rows_of(name), key=lambda r: (r["recipe"] != "float", r["site_bytes"] // 5_000_000, r["perplexity"]))
    lines = ["| recipe | perplexity | KL to float | same top-1 | site weights MB |", "|---|---|---|---|---|"]
    for r in rows:
        size = f"{r['site_bytes'] / 1e6:.0f}" if r["site_bytes"] else ""
        lines.append(f"| `{r['recipe']}` | {number(r['perplexity'])} | {r['kl']:.4f} | {r['agreement']:.1%} | {size} |")
    return "\n".join(lines)


def chosen(names: str) -> str:
    """Some recipes on both models; those that were measured on neither are left out."""
    found = [{r["recipe"]: r["perplexity"] for r in rows_of(name)} for name in ("perplexity", "perplexity-twin")]
    lines = ["| WikiText-2 perplexity | as it is | rotated twin |", "|---|---|---|"]
    for name in ["float", *names.split()]:
        cells = [number(of[name]) if name in of else "" for of in found]
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


def onnx(how: str, name: str = "onnx_cpu") -> str:
    """ONNX folders of ours and of onnxruntime-genai's builder, on one kind of processor."""
    head = "| folder | prefill of 512, tokens/s | decode, tokens/s | file MB | open MB | perplexity |"
    return "\n".join(
        [head, "|---|---|---|---|---|---|"]
        + [
            f"| {r['folder']} | {r['prefill']:.0f} | {r['decode']:.1f} | {r['megabytes']:.1f} "
            f"| {r['held_megabytes']:.0f} | {number(r['perplexity']) if 'perplexity' in r else ''} |"
            for r in rows_of(f"{name}-{how}" if how else name)
        ]
    )


def onnx_shapes(how: str) -> str:
    """The same of random weights, which have no perplexity."""
    return "\n".join(line.rpartition("|")[0].rpartition("|")[0] + "|" for line in onnx(how, "onnx_shapes").split("\n"))


def onnx_long(how: str) -> str:
    """The same with long prompts."""
    rows = [r for r in rows_of(f"onnx_cpu-{how}") if r["long"]]
    lengths = list(rows[0]["long"])
    head = [f"| folder | {' | '.join(f'{n} tokens, s to the first new one | decode' for n in lengths)} |"]
    head.append("|---" * (1 + 2 * len(lengths)) + "|")
    cells = [" | ".join(f"{a['first']:.2f} | {a['decode']:.0f}" for a in r["long"].values()) for r in rows]
    return "\n".join([*head, *(f"| {r['folder']} | {cell} |" for r, cell in zip(rows, cells, strict=True))])


def onnx_few(how: str) -> str:
    """From how many tokens int8 products are faster."""
    rows = json.loads((ROOT / "benches" / "results" / f"onnx_cpu-{how}.json").read_text())["few"]
    lines = [f"| tokens behind a cache of 256 | {' | '.join(str(r['tokens']) for r in rows)} |"]
    lines.append("|---" * (1 + len(rows)) + "|")
    for way, name in (("few", "4-bit codes, ms"), ("many", "int8, ms")):
        lines.append(f"| {name} | {' | '.join(f'{r[way]:.1f}' for r in rows)} |")
    return "\n".join(lines)


def roofline(how: str) -> str:
    """How far decoding is from reading the file, and a prompt from the rate of int8 products."""
    found = json.loads((ROOT / "benches" / "results" / f"onnx_cpu-{how}.json").read_text())
    rate = max(found["int8_rates"].values()) / 1e9
    head = f"decode, of {found['bandwidth'] / 1e9:.0f} GB/s | prefill, of {rate:.0f} G multiply-adds/s"
    return "\n".join(
        [f"| folder | {head} |", "|---|---|---|"]
        + [f"| {r['folder']} | {r['share_of_bandwidth']:.0%} | {r['share_of_int8']:.0%} |" for r in found["rows"]]
    )


def onnx_pieces(how: str) -> str:
    """An attention at once and in pieces."""
    rows = rows_of(f"onnx_long_prompts-{how}")
    names = list(rows[0]["milliseconds"])
    head = f"| new tokens | past | {' | '.join(f'{name}, ms' for name in names)} |"
    lines = []
    for row in rows:
        times = " | ".join(f"{row['milliseconds'][name]:.2f}" for name in names)
        lines.append(f"| {row['new']} | {row['past']} | {times} |")
    return "\n".join([head, "|---|---|" + "---|" * len(names), *lines])


def onnx_encoder(how: str) -> str:
    """Sentence embeddings of ONNX folders."""
    head = "| folder | file MB | mean cosine similarity to float | least | sentences/s | x float |"
    rows = rows_of(f"onnx_encoder-{how}")
    return "\n".join(
        [head, "|---|---|---|---|---|---|"]
        + [
            f"| {r['folder']} | {r['megabytes']:.1f} | {r['mean']:.4f} | {r['least']:.4f} "
            f"| {r['rate']:.0f} | {r['rate'] / rows[0]['rate']:.2f} |"
            for r in rows
        ]
    )


def engines(how: str) -> str:
    """Other engines on the same model."""
    lines = ["| engine | prefill of 512, tokens/s | decode, tokens/s | open MB |", "|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {r['engine']} | {r['prefill']:.0f} | {r['decode']:.1f} | {r['held_megabytes']:.0f} |"
            for r in rows_of(f"engines_cpu-{how}")
        ]
    )


def fixed_scales(_: str) -> str:
    """How the scale of a channel of a cache is found."""
    rows = {(r["bits"], r["peak"]): number(r["perplexity"]) for r in rows_of("fixed_scales")}
    peaks = {"channel": "max \\|a\\| of the channel", "pair": "of its pair", "tensor": "of all channels"}
    lines = [f"| float: {rows[32, '']}; peak | 8 bits | 4 bits |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {text} | {rows[8, peak]} | {rows[4, peak]} |" for peak, text in peaks.items())])


def w4a8(_: str) -> str:
    """Blocks and bases of W4A8."""
    lines = ["| basis | blocks of layers | of logits | MB of codes and scales | perplexity |", "|---|---|---|---|---|"]
    for r in rows_of("w4a8_formats"):
        size = f"{r['megabytes']:.1f}" if "megabytes" in r else ""
        lines.append(
            f"| {r['basis']} | {r.get('layers', '')} | {r.get('logits', '')} | {size} | {number(r['perplexity'])} |"
        )
    return "\n".join(lines)


TABLES = {
    "table": accuracy,
    "recipes": chosen,
    "prefixes": prefixes,
    "costs": costs,
    "onnx": onnx,
    "long": onnx_long,
    "roofline": roofline,
    "shapes": onnx_shapes,
    "few": onnx_few,
    "encoder": onnx_encoder,
    "pieces": onnx_pieces,
    "engines": engines,
    "fixed": fixed_scales,
    "w4a8": w4a8,
}


def main() -> None:
    """Rewrite every table in place."""
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text()
        new = re.sub(
            rf"(<!-- ({'|'.join(TABLES)})((?: [^\n]*?)?) -->\n).*?(<!-- end -->)",
            lambda m: f"{m[1]}{TABLES[m[2]](m[3].strip())}\n{m[4]}",
            text,
            flags=re.S,
        )
        if new != text:
            page.write_text(new)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
