"""IntactKV on the embedded LLM: windows that begin with the model's own first token, with and without it.

python benches/intact_kv.py [TEXT [CALIBRATION_TEXT]]      writes benches/results/intact_kv.json
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.table import Table

import qcompile
from qcompile.calibration.text import batches, read_text, windows
from qcompile.cli.output import print_table
from qcompile.evaluation.perplexity import agreement, perplexity
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.passes import CalibratePrefix, IntactKV, Quantize
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe

HERE = Path(__file__).parent
RECIPES = [str(HERE / "recipes" / "w3a16.json"), "w4a4-rotated", "w4a16"]


def intact(recipe: Recipe, *, trained: bool = False) -> Recipe:
    """The recipe with IntactKV before its quantizing pass, and CalibratePrefix after it."""
    at = next(i for i, config in enumerate(recipe.passes) if isinstance(config, Quantize))
    quantizer, *rest = recipe.passes[at:]
    behind = (CalibratePrefix(),) if trained else ()
    passes = (*recipe.passes[:at], IntactKV(), quantizer, *behind, *rest)
    name = f"{recipe.name} + IntactKV" + (", trained" if trained else "")
    return dataclasses.replace(recipe, name=name, passes=passes)


def main() -> None:
    """Measure, print, write."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    calibration = sys.argv[2] if len(sys.argv) > 2 else None
    model, tokenizer = load_pretrained()
    first = torch.tensor([[model.config.bos_token_id]])
    pieces = [torch.cat([first, w], 1) for w in windows(tokenizer, read_text(text), length=2047)]
    table, rows = Table("recipe", "perplexity", "KL to float"), []
    rows.append(dict(recipe="float", perplexity=perplexity(model, pieces, progress=False), kl=0.0))
    for name in RECIPES:
        plain = find_recipe(name)
        for recipe in (plain, intact(plain), intact(plain, trained=True)):
            candidate = copy.deepcopy(model)
            data = batches(tokenizer, calibration, count=32) if recipe.needs else None
            qcompile.quantize(candidate, recipe, data, progress=False)
            found = agreement(candidate, model, pieces)
            rows.append(dict(recipe=recipe.name, perplexity=found.perplexity, kl=found.kl))
    for row in rows:
        table.add_row(row["recipe"], f"{row['perplexity']:.3f}", f"{row['kl']:.4f}")
    print_table(table)
    data = {"versions": versions(), "rows": rows}
    (HERE / "results" / "intact_kv.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
