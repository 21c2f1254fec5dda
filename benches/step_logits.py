"""How far the logits of a compiled decode step are from the eager model's, and the eager model from itself.

    python benches/step_logits.py      prints three cosines, writes benches/results/step_logits.json

SmolLM2 with w4a8, the last token of a text behind a cache. The step is the lowered graph, run node by node in float32;
the eager model is the same quantized one in float32 and in float64. Nothing but the order of float sums differs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import qcompile
from qcompile.backend.decode_step import DecodeStep
from qcompile.backend.options import Options
from qcompile.memory.environment import versions

RESULTS = Path(__file__).parent / "results" / "step_logits.json"
TEXT = (
    "The history of the railway in Britain began with horse drawn waggonways, and steam locomotives followed in the "
    "early nineteenth century. "
) * 2


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors, in float64."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), 0))


def main() -> None:
    """Measure, print, write."""
    model, tokenizer = qcompile.load_pretrained()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    past = ids.shape[1] - 1
    qcompile.quantize(model, "w4a8", progress=False, verify=False)
    DecodeStep._compile = lambda step, inputs, options: None  # type: ignore[method-assign]  # run node by node
    step = DecodeStep(model, Options.read({"verify": False, "on_slow_kernel": "quantize"}))
    with torch.no_grad():
        buffers = []
        for layer in model(input_ids=ids[:, :-1], use_cache=True).past_key_values.layers:
            for part in (layer.keys, layer.values):
                buffers.append(torch.cat([part, torch.zeros_like(part[:, :, :1])], dim=2))
        mask, position = torch.ones(1, past + 1, dtype=torch.long), torch.full((1, 1), past)
        stepped = step.program(ids[:, -1:], position, mask, *buffers)[0][0, -1]
        single = model(input_ids=ids, use_cache=False).logits[0, -1]
        double = model.double()(input_ids=ids, use_cache=False).logits[0, -1]
    found = {
        "step and eager, float32": cosine(stepped, single),
        "step float32 and eager float64": cosine(stepped, double),
        "eager float32 and eager float64": cosine(single, double),
    }
    for name, value in found.items():
        print(f"{name}: {value:.5f}")
    RESULTS.write_text(json.dumps({"versions": versions(), "cosines": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
