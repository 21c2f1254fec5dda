"""The tables of docs/algorithms/q-galore.md, from q_galore.json; update_docs.py writes them."""

from __future__ import annotations

import statistics
from typing import Any

from compile_tables import RESULTS, read

NAMES = {
    "adamw": "AdamW",
    "adamw-high": "AdamW",
    "bitsandbytes": "AdamW8bit of bitsandbytes",
    "galore_torch": "GaLoreAdamW of galore-torch",
    "ours-galore": "`QGaLore(weight=None, basis=None, factor=1)`, AdamW",
    "reference": "the authors' code, adapted",
    "ours": "`q-galore`, `QGaLoreAdamW8bit`",
    "ours-bitsandbytes": "`q-galore`, AdamW8bit of bitsandbytes",
    "ours-nearest": "the same as `q-galore`, rounding to nearest",
}
PARTS = ("weights", "projections", "moments", "gradients", "low")


def measured() -> dict[str, Any]:
    """The results; empty if there are none."""
    return dict(read("q_galore")) if (RESULTS / "q_galore.json").is_file() else {}


def losses(_: str) -> str:
    """Loss and bytes of each variant."""
    rows = measured().get("losses", {})
    lines = [
        "| | lr | validation, nats a byte | weights | bases | moments | gradients | L | sum, KB | of AdamW |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in NAMES.items():
        if kind in rows:
            r = rows[kind]
            parts = " | ".join(f"{r['bytes'][part] / 1e3:.0f}" for part in PARTS)
            total = f"{r['total'] / 1e3:.0f} | {r['total'] / rows['adamw']['total']:.2f}"
            seeds = r["losses"].values()
            spread = f" ± {statistics.stdev(seeds):.3f} ({len(seeds)})" if len(seeds) > 1 else ""
            lines.append(f"| {name} | {r['lr']} | {r['loss']:.3f}{spread} | {parts} | {total} |")
    return "\n".join(lines)


def memory(_: str) -> str:
    """Peaks of processes."""
    rows = measured().get("memory", {})
    lines = [
        "| | built | peak of the first step | of later steps | peak above the process | of AdamW | "
        "with freed blocks returned | of AdamW |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in NAMES.items():
        if kind in rows:
            default, returned = rows[kind]["default"], rows[kind]["returned"]
            cells = [f"{default[part] / 1e6:.0f}" for part in ("built", "first", "later", "peak")]
            cells.append(f"{default['peak'] / rows['adamw']['default']['peak']:.2f}")
            cells += [f"{returned['peak'] / 1e6:.0f}", f"{returned['peak'] / rows['adamw']['returned']['peak']:.2f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times(_: str) -> str:
    """Step times relative to AdamW's."""
    found = measured()
    columns = {
        "eager, hidden 128": found.get("eager_ms", {}).get("128", {}),
        "eager, 512": found.get("eager_ms", {}).get("512", {}),
        "Inductor, 512": found.get("compiled_ms", {}).get("512", {}),
        '`backend="qcompile"`, 512': found.get("qcompile_ms", {}).get("512", {}),
    }
    lines = [f"| step time / AdamW's | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for kind, name in NAMES.items():
        cells = [f"{c[kind] / c['adamw']:.2f}" if kind in c and "adamw" in c else "" for c in columns.values()]
        if any(cells) and kind != "adamw":
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def weight_gradients(_: str) -> str:
    """Law P as time."""
    lines = ["| T, N, K | r | dtype | project behind, ms | before, ms | ratio |", "|---|---|---|---|---|---|"]
    for r in measured().get("weight_gradient", []):
        sizes = f"{r['tokens']}, {r['N']}, {r['K']} | {r['rank']} | {r['dtype']}"
        lines.append(f"| {sizes} | {r['behind']:.1f} | {r['before']:.1f} | {r['ratio']:.2f} |")
    return "\n".join(lines)


TABLES = {
    "q-galore": losses,
    "q-galore-memory": memory,
    "q-galore-times": times,
    "q-galore-gradients": weight_gradients,
}
