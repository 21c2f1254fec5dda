"""Sentence embeddings of exported ONNX folders against the float model's: cosine similarity, size and speed.

    python benches/onnx_encoder.py [TEXT [MODEL]]      writes benches/results/onnx_encoder-ISA.json

ISA is this processor's int8 instruction set: amx, vnni, avx2.
TEXT: 256 sentences of it are embedded (default: the embedded text); calibration reads other sentences of the embedded
text. MODEL: a folder or hub id (default: the encoder that a package carries). Every row but one is a
folder as `qcompile export-onnx MODEL FOLDER --recipe .. --pooling mean --normalize` writes it, run by ONNX Runtime. The
peer is torch.onnx's own export of the same, with ONNX Runtime's `quantize_dynamic` (int8 weights, a scale for each
channel).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.table import Table

import qcompile
from qcompile.calibration.text import sentence_batches, sentences
from qcompile.cli.output import print_table
from qcompile.codegen.onnx.sentence_embedding import PooledEncoder, Pooling
from qcompile.generation.pretrained import load_encoder
from qcompile.memory.environment import versions
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import processor
from qcompile.passes import GPTQ, Fuse, Quantize
from qcompile.recipe.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / f"onnx_encoder-{processor()}.json"
ROUNDS = 7
G32 = Format.parse("int4/group32/zero")
GPTQ_G32 = Recipe("int4-g32-gptq", (GPTQ(G32, None, lm_head=None, clip=True), Fuse()))
INT8 = Format("int8")
RECIPES: dict[str, tuple[str | Recipe | None, dict[str, int]]] = {  # recipe, further options of the export
    "float": (None, {}),
    "int8": ("int8", {}),
    "int8-zero": ("int8-zero", {}),
    "int8, one scale and zero point for all tokens": (
        Recipe("int8-tensor", (Quantize(INT8, Format.parse("int8/tensor/zero")), Fuse())), {},
    ),
    "w8a16": ("w8a16", {}),
    "int4 g32": (Recipe("int4-g32", (Quantize(G32, None, lm_head=None, clip=True), Fuse())), {}),
    "int4 g32, GPTQ": (GPTQ_G32, {}),
    "int4 g32, GPTQ, accuracy level 1": (GPTQ_G32, {"accuracy_level": 1}),
}  # fmt: skip
PEER = "torch.onnx, quantize_dynamic"


class Positional(torch.nn.Module):
    """The sentence embedding as torch.onnx wants it: one output of positional inputs."""

    def __init__(self, pooled: PooledEncoder, names: list[str]) -> None:
        super().__init__()
        self.pooled, self.names = pooled, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """[B, C]."""
        return self.pooled(**dict(zip(self.names, values, strict=True)))["sentence_embedding"]


def write_peer(pooled: PooledEncoder, batch: dict[str, torch.Tensor], folder: Path) -> None:
    """torch.onnx.export, and quantize_dynamic."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir()
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / "model.onnx"
        torch.onnx.export(
            Positional(pooled, list(batch)), tuple(batch.values()), str(plain), dynamo=True, external_data=False,
            input_names=list(batch), output_names=["sentence_embedding"], dynamic_shapes=[tuple(free for _ in batch)],
            verbose=False,
        )  # fmt: skip
        quantize_dynamic(str(plain), str(folder / "model.onnx"), weight_type=QuantType.QInt8, per_channel=True)


def main() -> None:
    """Export, embed, compare, time, print, write."""
    model, tokenizer = load_encoder(sys.argv[2] if len(sys.argv) > 2 else "")
    calibration = sentence_batches(tokenizer, sentences(count=512)[::2])
    texts = sentences(sys.argv[1], count=256) if len(sys.argv) > 1 else sentences(count=512)[1::2]
    batches = sentence_batches(tokenizer, texts)
    with torch.no_grad():
        pooled = PooledEncoder(model, Pooling("mean", True)).eval()
        want = np.concatenate([pooled(**batch)["sentence_embedding"].numpy() for batch in batches])
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / str(index) for index, name in enumerate(RECIPES)}
        for name, (recipe, more) in RECIPES.items():
            options = dict(example=calibration[0], tokenizer=tokenizer, pooling="mean", normalize=True, progress=False)
            qcompile.export_onnx(model, folders[name], recipe, calibration if recipe else None, **options, **more)
        folders[PEER] = Path(place) / "peer"
        write_peer(pooled, calibration[0], folders[PEER])
        sizes = {n: sum(path.stat().st_size for path in f.glob("model.onnx*")) for n, f in folders.items()}
        embeddings, seconds = embed(folders, batches)
    rows = []
    for name, got in embeddings.items():
        cosine = (got * want).sum(1)
        rows.append(
            dict(folder=name, megabytes=sizes[name] / 1e6, mean=float(cosine.mean()), least=float(cosine.min()))
            | dict(rate=len(texts) / seconds[name])
        )
    table = Table(f"{len(texts)} sentences", "file MB", "mean cosine", "least", "sentences/s", "x float")
    for row in rows:
        table.add_row(
            row["folder"], f"{row['megabytes']:.1f}", f"{row['mean']:.5f}", f"{row['least']:.5f}",
            f"{row['rate']:.0f}", f"{row['rate'] / rows[0]['rate']:.2f}",
        )  # fmt: skip
    print_table(table)
    result = dict(versions=versions(), sentences=len(texts), rounds=ROUNDS, rows=rows)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def embed(
    folders: dict[str, Path], batches: list[dict[str, torch.Tensor]]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Embeddings [N, C] of all sentences by ONNX Runtime, and the median of the seconds that they took, interleaved."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads of the others
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        for name, folder in folders.items()
    }
    feeds = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
    found: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {name: [] for name in folders}
    for step in range(ROUNDS + 1):  # the first warms up
        for name, session in sessions.items():
            start = time.perf_counter()
            found[name] = np.concatenate([session.run(["sentence_embedding"], feed)[0] for feed in feeds])
            if step:
                times[name].append(time.perf_counter() - start)
    return found, {name: statistics.median(taken) for name, taken in times.items()}


if __name__ == "__main__":
    main()
