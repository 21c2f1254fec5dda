"""An export whose external data exceed 2 GB (what one protobuf message can hold), by shapes with random weights.

    python benches/onnx_large.py [FOLDER]      needs 10 GB of memory and 3 GB of disk; deletes what it writes

A float decoder with a vocabulary of 131072: the tables alone take 2.1 GB. The export proves itself against PyTorch as
every export does; here the folder is opened once more and read to the file's end. Writes
benches/results/onnx_large.json: bytes, and the peak of memory above the weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.generation.onnx_session import Session
from qcompile.memory.environment import versions
from qcompile.memory.process import measure_peak

RESULTS = Path(__file__).parent / "results" / "onnx_large.json"
LIMIT = 2**31


def main() -> None:
    """Export, open, compare, write."""
    config = LlamaConfig(
        vocab_size=131072, hidden_size=2048, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    weights = sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        folder = Path(place) / "m"
        with measure_peak() as peak:
            report = qcompile.export_onnx(model, folder, progress=False)
        data = (folder / "model.onnx.data").stat().st_size
        ids = torch.arange(16)[None] * 8191
        session = Session(folder)
        error = float((session(input_ids=ids) - model(ids).logits).norm() / model(ids).logits.norm())
    assert data > LIMIT and error < 1e-3, (data, error)
    found = dict(
        versions=versions(), weight_bytes=weights, data_bytes=data, peak_over_weights=peak.bytes / weights,
        proven=report.metrics["onnx relative error"], opened_again=error,
    )  # fmt: skip
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
