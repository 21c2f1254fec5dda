"""INT4 ONNX of a Llama of 1B shapes (random weights, some layers) against onnxruntime-genai's model builder.

    python benches/onnx_shapes.py [LAYERS]      writes benches/results/onnx_shapes-ISA.json (as onnx_cpu.py)

As benches/onnx_cpu.py, without perplexity: speed, memory, sizes, and what exporting takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_cpu
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.cli.output import print_table, tell
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.memory.process import measure_peak
from qcompile.numerics.int8_matmul import processor
from qcompile.passes import GPTQ, Quantize
from qcompile.pipeline.presets import PRESETS
from qcompile.recipe.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / f"onnx_shapes-{processor()}.json"


def nearest(recipe: Recipe) -> Recipe:
    """A recipe that rounds to nearest in place of GPTQ: random weights have nothing to search for."""
    passes = (Quantize(p.weight, p.act, p.lm_head, p.lm_head_act) if isinstance(p, GPTQ) else p for p in recipe.passes)
    return Recipe(recipe.name, tuple(passes))


def shapes(layers: int) -> Any:
    """Hidden 2048, intermediate 8192, 32 heads of 64, 8 key/value heads, tied; float32."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def main() -> None:
    """Export, measure, print, write."""
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    console = Console(width=140)
    model, tokenizer = shapes(layers), load_pretrained()[1]
    weights = sum(p.nbytes for p in model.parameters())
    onnx_cpu.BUILDER.pop("GenAI int4, block 32, k_quant")  # as fast as the other of block 32
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        folders = onnx_cpu.build_peers(work, model, tokenizer, console)
        # for the scales of the cache, and of PerTensorActivations
        some = [{"input_ids": torch.randint(3, 40000, (1, 256))} for _ in range(4)]
        qcompile.quantize(model, nearest(PRESETS[onnx_cpu.BEST]), some)
        start = time.perf_counter()
        with measure_peak() as peak:
            qcompile.export_onnx(model, work / "ours", tokenizer=tokenizer)
        export = dict(seconds=time.perf_counter() - start, peak_over_float=peak.bytes / weights)
        qcompile.export_onnx(model, work / "last", tokenizer=tokenizer, last_logits=True)
        name = f"qcompile {onnx_cpu.BEST}'s formats"
        folders |= {name: work / "ours", f"{name}, last logits": work / "last"}
        del model
        times = onnx_cpu.time_all(folders, {}, set())
        sizes = {name: sum(f.stat().st_size for f in folder.glob("model.onnx*")) for name, folder in folders.items()}
    rows = [dict(folder=name, megabytes=sizes[name] / 1e6, **times[name]) for name in folders]
    table = Table(f"{layers} layers", "prefill 512, tokens/s", "decode, tokens/s", "file MB", "open MB")
    for row in rows:
        figures = (row["prefill"], row["decode"], row["megabytes"], row["memory_megabytes"])
        table.add_row(row["folder"], *(f"{value:.1f}" for value in figures))
    print_table(table)
    tell(export)
    found = dict(versions=versions(), layers=layers, float_bytes=weights, export=export, rows=rows)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
