"""Perplexity of the embedded LLM under every data-free recipe, and under those that calibrate.

    python benches/perplexity.py TEXT [CALIBRATION_TEXT]     writes benches/results/perplexity.json

TEXT is evaluated as 4 windows of 2048 tokens; calibration reads another file (or the embedded text).
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qcompile import quantize
from qcompile.bench import versions
from qcompile.evaluate import perplexity
from qcompile.presets import PRESETS
from qcompile.pretrained import load_pretrained
from qcompile.text import batches, read_text, windows

RESULTS = Path(__file__).parent / "results" / "perplexity.json"


def main() -> None:
    """Measure, print, write."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    calibration = sys.argv[2] if len(sys.argv) > 2 else None
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, read_text(text))
    table = Table("recipe", "perplexity", "site weights MB", "quantize s")
    rows = []
    for name, recipe in PRESETS.items():
        if name == "exact":
            continue
        candidate = copy.deepcopy(model)
        row: dict[str, object] = {"recipe": name, "text": Path(text).name if text else "embedded"}
        if recipe.passes:
            report = quantize(candidate, name, batches(tokenizer, calibration) if recipe.needs else None)
            row |= {"site_bytes": report.bytes_after, "seconds": round(report.seconds, 1)}
        row["perplexity"] = perplexity(candidate, pieces, label=name)
        rows.append(row)
        table.add_row(name, f"{row['perplexity']:.2f}", str(row.get("site_bytes", "")), str(row.get("seconds", "")))
    Console().print(table)
    RESULTS.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
