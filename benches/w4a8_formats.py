"""W4A8 for ONNX folders: which blocks of 4-bit codes, on which basis.

    python benches/w4a8_formats.py [TEXT]      writes benches/results/w4a8_formats.json

The embedded LLM after GPTQ on 32 windows of 512 tokens from the end of TEXT, its perplexity on 2 windows of 2048 from
the beginning. Embeddings are as a file has them: from the
codes of the logits, on rotated bases times a matrix (codegen/onnx/tables.py).
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

import qcompile
from qcompile.bench import versions
from qcompile.codegen.onnx.tables import nearest_turn
from qcompile.evaluate import perplexity
from qcompile.formats import Format
from qcompile.passes import GPTQ, FoldNorm, Fuse, QuantizeKV, Rotate, Smooth, Untie
from qcompile.pretrained import load_pretrained
from qcompile.recipe import Recipe
from qcompile.text import batches, read_text, windows

RESULTS = Path(__file__).parent / "results" / "w4a8_formats.json"
BASES = {"smoothed": (Smooth(alpha=0.6),), "rotated": (Untie(), FoldNorm(), Rotate())}
FORMATS = ["int4/group32/dual", "int4/group64/zero/dual", "int4/group128/zero/dual"]


def recipe(basis: str, form: str) -> Recipe:
    """W4A8 everywhere and an int8 cache."""
    weight, act = Format.parse(form), Format("int8")
    gptq = GPTQ(weight, act, output=weight, output_act=act, clip=True)
    return Recipe(f"{basis} {form}", (*BASES[basis], QuantizeKV(8, fixed=True), gptq, Fuse()))


def share_table(model: nn.Module, turned: bool) -> None:
    """Put into the embedding what a file gathers from the codes of the logits."""
    table, codes = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table.data = codes @ nearest_turn(codes, table) if turned else codes


def main() -> None:
    """Measure, print, write."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    model, tokenizer = load_pretrained()
    pieces, data = windows(tokenizer, read_text(text), count=2), batches(tokenizer, text, count=32)
    rows = [dict(basis="", format="float", perplexity=perplexity(model, pieces))]
    for basis in BASES:
        for form in FORMATS:
            small = copy.deepcopy(model)
            qcompile.quantize(small, recipe(basis, form), data)
            row = dict(basis=basis, format=form, float_table=perplexity(small, pieces))
            share_table(small, basis == "rotated")
            rows.append(row | dict(perplexity=perplexity(small, pieces)))
            RESULTS.write_text(json.dumps(dict(versions=versions(), rows=rows), indent=1) + "\n")
    table = Table("basis", "format", "perplexity", "with a float table")
    for row in rows:
        table.add_row(
            row["basis"], row["format"], f"{row['perplexity']:.2f}", f"{row.get('float_table', row['perplexity']):.2f}"
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
