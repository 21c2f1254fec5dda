"""What quantizing costs: seconds, and memory above what the process held with the float model.

    python benches/quantize_cost.py [recipe ..]     writes benches/results/quantize_cost.json

Each recipe runs in a process of its own, and so does `plain-gptq`, a GPTQ loop by hooks as one writes it
in an afternoon (benches/plain_gptq.py), on the text of `w4a16-gptq`, with its format and search. Peak memory is the
process's high-water mark meanwhile, the float model included, over the bytes of the float weights. Rows of
other recipes are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qcompile.memory.environment import versions

RESULTS = Path(__file__).parent / "results" / "quantize_cost.json"
RECIPES = ["int8", "w8a16", "w4a16", "w4a8", "int8-smooth", "int8-rotated", "w4a16-gptq", "plain-gptq", "w4a8-gptq"]
PLAIN = "plain-gptq"
WINDOWS = {"w4a16-gptq": 64, "w4a8-gptq": 64, PLAIN: 64}  # of 512 tokens, to calibrate on; 16 for the others


def one(recipe: str) -> dict[str, object]:
    """Quantize SmolLM2 in this process."""
    from plain_gptq import plain_gptq

    import qcompile
    from qcompile.calibration.text import batches
    from qcompile.generation.pretrained import load_pretrained
    from qcompile.memory.process import measure_peak
    from qcompile.pipeline.presets import find_recipe

    model, tokenizer = load_pretrained()
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    calibrated = recipe == PLAIN or find_recipe(recipe).needs
    data = batches(tokenizer, count=WINDOWS.get(recipe, 16)) if calibrated else None
    start = time.perf_counter()
    with measure_peak() as peak:
        if recipe == PLAIN:
            plain_gptq(model, data)
        else:
            qcompile.quantize(model, recipe, data, progress=False)
    seconds, extra = time.perf_counter() - start, peak.bytes
    row = dict(recipe=recipe, seconds=seconds, weights=weights, extra=extra, ratio=(weights + extra) / weights)
    return row | dict(isa=versions()["isa"])  # rows are of different runs


def main() -> None:
    """Run each recipe in its own process, print, write."""
    recipes = sys.argv[1:] or RECIPES
    table = Table("recipe", "seconds", "float weights MB", "peak above the float model MB", "peak / float weights")
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for recipe in recipes:
        script = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import quantize_cost as q"
        call = [sys.executable, "-c", f"{script}; print(json.dumps(q.one({recipe!r})))"]
        row = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows = [*(r for r in rows if r["recipe"] != recipe), row]
        mb = [f"{row[k] / 1e6:.0f}" for k in ("weights", "extra")]
        table.add_row(recipe, f"{row['seconds']:.1f}", *mb, f"{row['ratio']:.2f}")
    Console().print(table)
    RESULTS.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
