"""W4A8 for ONNX folders: which blocks of 4-bit codes, of the layers and of the logits, on which basis.

    python benches/w4a8_formats.py [TEXT]      writes benches/results/w4a8_formats.json

The embedded LLM after GPTQ on 32 windows of 512 tokens from the end of TEXT, its perplexity on 2 windows of 2048 from
the beginning. Embeddings are as a file has them: from the codes of the logits times a matrix (tied_embedding.py).
The bytes are those of all codes, zero points and scales, as MatMulNBits wants blocks filled up.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

from rich.table import Table
from torch import nn

import qcompile
from qcompile.calibration.text import batches, read_text, windows
from qcompile.cli.output import print_table
from qcompile.codegen.onnx.fusions.change_of_basis import fit_change_of_basis
from qcompile.codegen.onnx.tracing.weight_layouts import to_matmul_nbits, weight_of
from qcompile.evaluation.perplexity import perplexity
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.passes import GPTQ, FoldNorm, Fuse, QuantizeKV, Rotate, SmoothQuant, Untie
from qcompile.recipe.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "w4a8_formats.json"
BASES = {"smoothed": (SmoothQuant(alpha=0.6),), "rotated": (Untie(), FoldNorm(), Rotate())}
FORMS = {"32": "int4/group32/dual", "64": "int4/group64/zero/dual", "128": "int4/group128/zero/dual"}
ROWS = [("smoothed", "32", "32"), ("rotated", "32", "32"), ("rotated", "64", "64"), ("rotated", "128", "128")]
ROWS += [("rotated", "128", "64")]


def recipe(basis: str, layers: str, logits: str) -> Recipe:
    """W4A8 everywhere and an int8 cache."""
    weight, output, act = Format.parse(FORMS[layers]), Format.parse(FORMS[logits]), Format("int8")
    gptq = GPTQ(weight, act, lm_head=output, lm_head_act=act, clip=True)
    return Recipe(f"{basis} {layers} {logits}", (*BASES[basis], QuantizeKV(8, static=True), gptq, Fuse()))


def share_table(model: nn.Module, form: Format) -> float:
    """Put into the embedding what a file gathers from the codes of the logits; how far that is, in own roundings."""
    table, codes = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    shared = fit_change_of_basis("table", table, codes, form)
    assert shared is not None, "a file would hold a table of its own"
    table.data = shared.values
    return shared.error_ratio


def megabytes(model: nn.Module) -> float:
    """Of codes, zero points and scales in a file (weight_layouts.py and compact_scales.py)."""
    total = 0
    for site in (m for m in model.modules() if isinstance(m, QuantLinear)):
        codes, scales, zeros = to_matmul_nbits(weight_of(site))
        total += codes.numel() + scales.numel() + (0 if zeros is None else zeros.numel()) + 4 * len(scales)
    return total / 1e6


def main() -> None:
    """Measure, print, write."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    model, tokenizer = load_pretrained()
    pieces, data = windows(tokenizer, read_text(text), count=2), batches(tokenizer, text, count=32)
    rows = [dict(basis="float", perplexity=perplexity(model, pieces))]
    for basis, layers, logits in ROWS:
        small = copy.deepcopy(model)
        qcompile.quantize(small, recipe(basis, layers, logits), data)
        row = dict(basis=basis, layers=layers, logits=logits, megabytes=megabytes(small))
        row["float_table"] = perplexity(small, pieces)
        row["farther"] = share_table(small, dataclasses.replace(Format.parse(FORMS[logits]), dual=False))
        rows.append(row | dict(perplexity=perplexity(small, pieces)))
        RESULTS.write_text(json.dumps(dict(versions=versions(), rows=rows), indent=1) + "\n")
    table = Table("basis", "blocks of layers", "of logits", "MB", "perplexity", "with a float table")
    for row in rows:
        cells = (f"{row[key]:.2f}" if key in row else "" for key in ("megabytes", "perplexity", "float_table"))
        table.add_row(row["basis"], row.get("layers", ""), row.get("logits", ""), *cells)
    print_table(table)


if __name__ == "__main__":
    main()
