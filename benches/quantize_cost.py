"""What quantizing costs: seconds, and peak memory above that of the process with the float model.

    python benches/quantize_cost.py [recipe ..]     writes benches/results/quantize_cost.json

Each recipe runs in a process of its own, and so does `gptq-baseline`, a straightforward GPTQ by hooks
(benches/gptq_baseline.py), on the text of `w4a16-gptq`, with its format and search. Peak memory is the process's
high-water mark meanwhile, the float model included, over the bytes of the float weights. Other recipes' rows stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from qcompile.cli.output import print_table
from qcompile.memory.environment import versions

RESULTS = Path(__file__).parent / "results" / "quantize_cost.json"
RECIPES = ["int8", "w8a16", "w4a16", "w4a8", "int8-smooth", "int8-rotated", "w4a16-gptq", "gptq-baseline", "w4a8-gptq"]
BASELINE = "gptq-baseline"
WINDOWS = {"w4a16-gptq": 64, "w4a8-gptq": 64, BASELINE: 64}  # of 512 tokens, to calibrate on; 16 for the others


def one(recipe: str) -> dict[str, object]:
    """Quantize SmolLM2 in this process."""
    from gptq_baseline import baseline_gptq

    import qcompile
    from qcompile.calibration.text import batches
    from qcompile.generation.pretrained import load_pretrained
    from qcompile.memory.process import measure_peak
    from qcompile.pipeline.find_recipe import find_recipe

    model, tokenizer = load_pretrained()
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    calibrated = recipe == BASELINE or find_recipe(recipe).needs
    data = batches(tokenizer, count=WINDOWS.get(recipe, 16)) if calibrated else None
    start = time.perf_counter()
    with measure_peak() as peak:
        if recipe == BASELINE:
            baseline_gptq(model, data)
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
    print_table(table)
    RESULTS.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
