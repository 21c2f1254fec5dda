"""Fixed scales of a key/value cache: how the scale of a channel is best found on shorter texts than are read.

    python benches/fixed_scales.py [TEXT [CALIBRATION_TEXT]]      writes benches/results/fixed_scales.json

The float embedded LLM, its keys and values rounded to b bits as they are appended, s = peak / (2^(b-1) - 1).
Calibrated on 16 texts of 512 tokens, read in 4 windows of 2048. The peak of a channel is

    channel     its own max |a|
    pair        sqrt(max a^2 + max b^2) of the two channels that the rotary embedding turns (QuantizeKV(8, static=True))
    tensor      the largest of all channels and heads
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import DynamicCache

from qcompile.calibration.text import batches, read_text, windows
from qcompile.evaluation.perplexity import perplexity
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.passes.kv_cache.quantize_kv import fixed_scale

OUT = Path(__file__).parent / "results" / "fixed_scales.json"
Peaks = dict[tuple[str, int], Tensor]  # of keys or values and a layer: [H, D]


class Watching(DynamicCache):
    """Gathers the largest of every channel."""

    def __init__(self, peaks: Peaks) -> None:
        super().__init__()
        self.peaks = peaks

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """What it is given."""
        for kind, x in (("keys", keys), ("values", values)):
            peak = x.abs().amax((0, 2))
            self.peaks[kind, layer] = torch.maximum(self.peaks.get((kind, layer), peak), peak)
        return super().update(keys, values, layer, *more, **named)


class Rounding(DynamicCache):
    """Holds numbers that were rounded in steps [H, D]."""

    def __init__(self, steps: Peaks, bits: int) -> None:
        super().__init__()
        self.steps, self.most = steps, 2 ** (bits - 1)

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Rounded."""
        rounded = []
        for kind, x in (("keys", keys), ("values", values)):
            step = self.steps[kind, layer][:, None]
            rounded.append((x / step).round().clamp(-self.most, self.most - 1) * step)
        return super().update(*rounded, layer, *more, **named)


def steps_of(peaks: Peaks, how: str, bits: int) -> Peaks:
    """The scales."""
    found: Peaks = {}
    for (kind, layer), peak in peaks.items():
        if how == "pair" and kind == "keys":  # halves of a head are turned with each other
            half = torch.arange(peak.shape[-1] // 2).repeat(2).expand(peak.shape)
            step = fixed_scale(peak, half)
        else:
            step = fixed_scale(peak.amax().expand(peak.shape) if how == "tensor" else peak)
        found[kind, layer] = step * 127 / (2 ** (bits - 1) - 1)
    return found


def main() -> None:
    """Measure, print, write."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    calibration = sys.argv[2] if len(sys.argv) > 2 else None
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, read_text(text))
    peaks: Peaks = {}
    with torch.no_grad():
        for batch in batches(tokenizer, calibration, count=16):
            model(**batch, past_key_values=Watching(peaks), use_cache=True)

    def measured(bits: int, how: str) -> float:
        steps = steps_of(peaks, how, bits)

        def call(input_ids: Tensor) -> Any:
            return model(input_ids=input_ids, past_key_values=Rounding(steps, bits), use_cache=True)

        return perplexity(call, pieces, label=f"{bits} bits, {how}")

    rows = [dict(bits=32, peak="", perplexity=perplexity(model, pieces, label="float"))]
    rows += [
        dict(bits=bits, peak=how, perplexity=measured(bits, how))
        for bits in (8, 4)
        for how in ("channel", "pair", "tensor")
    ]
    table = Table("bits", "peak of a channel", "perplexity")
    for row in rows:
        table.add_row(str(row["bits"]), str(row["peak"]), f"{row['perplexity']:.2f}")
    Console(width=120).print(table)
    OUT.write_text(json.dumps(dict(versions=versions(), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
