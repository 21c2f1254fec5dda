"""Whole models on a CPU against Inductor: a Llama of 1B shapes with random weights, and SmolLM2.

    python benches/llm_cpu.py [layers]      writes benches/results/llm_cpu.json

Everything runs in one process, candidates interleaved, medians; see qcompile/evaluation/throughput.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from roofline import bandwidth

from qcompile.cli.output import print_table, tell
from qcompile.evaluation.throughput import compare_with_inductor
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions

RESULTS = Path(__file__).parent / "results" / "llm_cpu.json"


def large(layers: int) -> torch.nn.Module:
    """Hidden 2048, intermediate 8192, 32 heads of 64, 8 key/value heads; random weights, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()


def main() -> None:
    """Measure, print, write."""
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    results: dict[str, object] = {"versions": versions(), "read_GBs": bandwidth() / 1e9}
    for name, model in (
        (f"1B shapes, {layers} layers", large(layers)),
        ("SmolLM2-135M", load_pretrained(dtype=torch.bfloat16)[0]),
    ):
        found = compare_with_inductor(model, ["int8", "w4a8", "w4a16"], also=torch.float32, decode_step=True)
        tell(name)
        print_table(found.table())
        results[name] = found.to_json()["rows"]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
