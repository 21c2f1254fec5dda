"""Perplexity of every preset on the embedded LLM and on a randomly rotated copy of it.

    python benches/perplexity.py TEXT [CALIBRATION_TEXT [RECIPES [rotated | model]]]

writes benches/results/perplexity.json, perplexity-rotated.json and their plots. TEXT is evaluated as 4 windows of 2048
tokens; calibration reads another file (or the embedded text), 64 windows of 512; RECIPES are names separated by commas,
all presets by default; the last word measures one of the two. An interrupted run continues where it stopped; remove the
JSON to start again.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from qcompile.calibration.text import batches, read_text, windows
from qcompile.cli.output import print_table, tell
from qcompile.evaluation.compare import Comparison, compare, plot, rotated_copy, table
from qcompile.generation.pretrained import load_pretrained
from qcompile.pipeline.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
EXTRA = sorted(str(p) for p in (Path(__file__).parent / "recipes").glob("*.json"))  # formats that no preset has


def of_rotated(name: str) -> bool:
    """Whether a recipe is measured on the rotated copy too: it quantizes weights, and does not rotate itself."""
    return not name.startswith(("w4a4", "kv")) and "rotated" not in name and name != "float"


def main() -> None:
    """Measure, print, write, plot."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    calibration = sys.argv[2] if len(sys.argv) > 2 else None
    presets = [name for name in PRESETS if name != "exact"]
    requested = sys.argv[3].split(",") if len(sys.argv) > 3 else [*presets, *EXTRA]
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, read_text(text))
    only = sys.argv[4] if len(sys.argv) > 4 else ""
    for which, make in (("-rotated", lambda: rotated_copy(model)), ("", lambda: model)):
        if only and (only == "rotated") != bool(which):
            continue
        out = RESULTS / f"perplexity{which}.json"
        label = f"SmolLM2-135M{which} on {Path(text).name if text else 'the embedded text'}"
        recipes = [name for name in requested if not which or of_rotated(name)]
        data = functools.partial(batches, tokenizer, calibration, count=64)
        comparison = Comparison(make(), pieces, data, out, label)
        tell(label)
        print_table(table(compare(comparison, recipes)))
        plot(list(comparison.rows.values()), out.with_suffix(".png"))  # of earlier runs too


if __name__ == "__main__":
    main()
