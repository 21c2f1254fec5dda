"""Training in 4-bit integers: a decoder on bytes of text, by the interval that gradients are rounded in.

    python benches/int4_transformer.py [--seeds N] [--steps N]      writes results/int4_transformer.json

A Llama of 2 layers and hidden size 64 on bytes of Python's own documentation, windows of 64, batches of 16; AdamW at
3e-3 without decay, a cosine to a tenth. The last tenth of the text is held out; nats a byte. The 14 linears between
embedding and logits train in 4 bits; the logits stay float.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from int4_training import FIXED, rounded
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile.calibration.text import embedded_text
from qcompile.cli.output import print_table
from qcompile.memory.environment import versions
from qcompile.modules.fixed_point_modules import FixedPointModule

OUT = Path(__file__).parent / "results" / "int4_transformer.json"
VARIANTS = ("float", "4 bits, float gradients", *FIXED)
LENGTH, BATCH = 64, 16


class RoundedLinear(nn.Module):
    """The same rounding of weight and activation, and float gradients; evaluated with the range of each batch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        return nn.functional.linear(rounded(x, 7, signed=True), rounded(self.linear.weight, 7, signed=True))


def model_of(variant: str, seed: int, example: Tensor) -> nn.Module:
    """The decoder of one variant."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if variant in FIXED:
        recipe = qcompile.Recipe(variant, (FIXED[variant],))
        qcompile.train(model, recipe, example=example, progress=False)
        count = sum(isinstance(module, FixedPointModule) for module in model.modules())
        assert count == 14, f"{count} linears train in 4 bits"
    elif variant != "float":
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, RoundedLinear(child))
    return model.train()


def run(variant: str, seed: int, steps: int, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Train one decoder; held-out loss, as it is deployed, and mean loss of the last tenth of the steps."""
    model = model_of(variant, seed, train[:LENGTH].view(1, -1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        starts = torch.randint(0, len(train) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([train[start : start + LENGTH] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    if variant in FIXED:
        qcompile.settle(model)
    with torch.no_grad():
        windows = held_out[: 64 * LENGTH].view(64, LENGTH)
        found = mean(model(input_ids=part, labels=part).loss.item() for part in windows.split(BATCH))
    return dict(variant=variant, seed=seed, held_out=found, loss=mean(losses[-max(steps // 10, 1) :]))


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    text = torch.tensor(list(embedded_text().encode()))
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    todo = [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]
    runs = [run(variant, seed, options.steps, train, held_out) for variant, seed in track(todo, "runs")]
    table, rows = Table("variant", "held-out loss, nats a byte", "+-", "last loss"), []
    for variant in VARIANTS:
        mine = [entry for entry in runs if entry["variant"] == variant]
        losses = [entry["held_out"] for entry in mine]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        rows.append(
            dict(variant=variant, held_out=mean(losses), spread=spread, loss=mean(entry["loss"] for entry in mine))
        )
        table.add_row(variant, f"{rows[-1]['held_out']:.4f}", f"{spread:.4f}", f"{rows[-1]['loss']:.4f}")
    print_table(table)
    result = dict(versions=versions(), seeds=options.seeds, steps=options.steps, rows=rows, runs=runs)
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
