"""Every preset on the embedded LLM, as it is and on its randomly rotated twin.

    python benches/perplexity.py TEXT [CALIBRATION_TEXT [RECIPES [twin | model]]]

writes benches/results/perplexity.json, perplexity-twin.json and their plots. TEXT is evaluated as 4
windows of 2048 tokens; calibration reads another file (or the embedded text), 64 windows of 512;
RECIPES are names separated by commas, all presets by default; the last word measures one of the two.
Interrupted, it goes on where it stopped; remove the JSON to start again.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from rich.console import Console

from qcompile.calibration.text import batches, read_text, windows
from qcompile.evaluation.compare import Comparison, compare, plot, rotated_twin, table
from qcompile.generation.pretrained import load_pretrained
from qcompile.pipeline.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
EXTRA = sorted(str(p) for p in (Path(__file__).parent / "recipes").glob("*.json"))  # formats that no preset has


def of_twin(name: str) -> bool:
    """Whether a recipe is measured on the twin too: what chooses weights; rotating again would change nothing."""
    return not name.startswith(("w4a4", "kv")) and "rotated" not in name and name != "float"


def main() -> None:
    """Measure, print, write, plot."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    calibration = sys.argv[2] if len(sys.argv) > 2 else None
    presets = [name for name in PRESETS if name != "exact"]
    wanted = sys.argv[3].split(",") if len(sys.argv) > 3 else [*presets, *EXTRA]
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, read_text(text))
    only = sys.argv[4] if len(sys.argv) > 4 else ""
    for which, make in (("-twin", lambda: rotated_twin(model)), ("", lambda: model)):
        if only and (only == "twin") != bool(which):
            continue
        out = RESULTS / f"perplexity{which}.json"
        label = f"SmolLM2-135M{which} on {Path(text).name if text else 'the embedded text'}"
        recipes = [name for name in wanted if not which or of_twin(name)]
        data = functools.partial(batches, tokenizer, calibration, count=64)
        comparison = Comparison(make(), pieces, data, out, label)
        Console(width=120).print(label, table(compare(comparison, recipes)))
        plot(list(comparison.rows.values()), out.with_suffix(".png"))  # of earlier runs too


if __name__ == "__main__":
    main()
