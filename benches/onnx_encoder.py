"""Sentence embeddings of exported ONNX folders against the float model's: cosine similarity and size.

    python benches/onnx_encoder.py [TEXT [MODEL]]      writes benches/results/onnx_encoder.json

TEXT: 256 sentences of it are embedded (default: the embedded text); calibration reads other sentences of the embedded
text. MODEL: a folder or hub id (default: the encoder that a package carries). Every row is a
folder as `qcompile export-onnx MODEL FOLDER --recipe .. --pooling mean --normalize` writes it, run by ONNX Runtime.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.bench import versions
from qcompile.codegen.onnx.pooling import Pooled, Pooling
from qcompile.formats import Format
from qcompile.passes import GPTQ, Fuse, Quantize
from qcompile.pretrained import load_encoder
from qcompile.recipe import Recipe
from qcompile.text import sentence_batches, sentences

RESULTS = Path(__file__).parent / "results" / "onnx_encoder.json"
G32 = Format.parse("int4/group32/zero")
RECIPES: dict[str, str | Recipe | None] = {
    "float": None,
    "int8": "int8",
    "w8a16": "w8a16",
    "int4 g32": Recipe("int4-g32", (Quantize(G32, None, output=None, clip=True), Fuse())),
    "int4 g32, GPTQ": Recipe("int4-g32-gptq", (GPTQ(G32, None, output=None, clip=True), Fuse())),
}


def main() -> None:
    """Export, embed, compare, print, write."""
    console = Console(width=120)
    model, tokenizer = load_encoder(sys.argv[2] if len(sys.argv) > 2 else "")
    calibration = sentence_batches(tokenizer, sentences(count=128)[::2])
    texts = sentences(sys.argv[1], count=256) if len(sys.argv) > 1 else sentences(count=512)[1::2]
    batches = sentence_batches(tokenizer, texts)
    with torch.no_grad():
        pooled = Pooled(model, Pooling("mean", True))
        want = np.concatenate([pooled(**batch)["sentence_embedding"].numpy() for batch in batches])
    rows = []
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "m"
            options = dict(example=calibration[0], tokenizer=tokenizer, pooling="mean", normalize=True, progress=False)
            qcompile.export_onnx(model, folder, recipe, calibration if recipe else None, **options)
            got = embedded(folder, batches)
            size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        cosine = (got * want).sum(1)
        rows.append(dict(folder=name, megabytes=size / 1e6, mean=float(cosine.mean()), least=float(cosine.min())))
    table = Table(f"{len(texts)} sentences", "file MB", "mean cosine", "least")
    for row in rows:
        table.add_row(row["folder"], f"{row['megabytes']:.1f}", f"{row['mean']:.5f}", f"{row['least']:.5f}")
    console.print(table)
    RESULTS.write_text(json.dumps(dict(versions=versions(), sentences=len(texts), rows=rows), indent=1) + "\n")


def embedded(folder: Path, batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """Embeddings [N, C] of all sentences by ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
    return np.concatenate([session.run(["sentence_embedding"], feed)[0] for feed in feeds])


if __name__ == "__main__":
    main()
