"""Static scales of a quantized KV cache: which peak of a channel holds on longer texts than those of calibration.

    python benches/static_kv_scales.py [TEXT [CALIBRATION_TEXT]]      writes benches/results/static_kv_scales.json

The float embedded LLM, its keys and values rounded to b bits as they are appended, s = peak / (2^(b-1) - 1).
Calibrated on 16 texts of 512 tokens, read in 4 windows of 2048. The peak of a channel is

    channel     its own max |a|
    pair        sqrt(max a^2 + max b^2) of the two channels that RoPE rotates (QuantizeKV(8, static=True))
    tensor      the largest of all channels and heads
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import DynamicCache

from qcompile.calibration.text import batches, read_text, windows
from qcompile.cli.output import print_table
from qcompile.evaluation.perplexity import perplexity
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.passes.kv_cache.quantize_kv import static_scale

OUT = Path(__file__).parent / "results" / "static_kv_scales.json"
Peaks = dict[tuple[str, int], Tensor]  # of keys or values and a layer: [H, D]


class PeakCache(DynamicCache):
    """Observes the largest absolute value of every channel."""

    def __init__(self, peaks: Peaks) -> None:
        super().__init__()
        self.peaks = peaks

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """The keys and values as they are."""
        for kind, x in (("keys", keys), ("values", values)):
            peak = x.abs().amax((0, 2))
            self.peaks[kind, layer] = torch.maximum(self.peaks.get((kind, layer), peak), peak)
        return super().update(keys, values, layer, *more, **named)


class FakeQuantizedCache(DynamicCache):
    """Rounds keys and values with static scales [H, D] as they are appended."""

    def __init__(self, scales: Peaks, bits: int) -> None:
        super().__init__()
        self.scales, self.most = scales, 2 ** (bits - 1)

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """The keys and values, quantized and dequantized."""
        rounded = []
        for kind, x in (("keys", keys), ("values", values)):
            scale = self.scales[kind, layer][:, None]
            rounded.append((x / scale).round().clamp(-self.most, self.most - 1) * scale)
        return super().update(*rounded, layer, *more, **named)


def scales_of(peaks: Peaks, shared_by: str, bits: int) -> Peaks:
    """The scales [H, D] of b-bit codes; `shared_by` says of what a channel takes the peak."""
    found: Peaks = {}
    for (kind, layer), peak in peaks.items():
        if shared_by == "pair" and kind == "keys":  # RoPE rotates the halves of a head with each other
            half = torch.arange(peak.shape[-1] // 2).repeat(2).expand(peak.shape)
            scale = static_scale(peak, half)
        else:
            scale = static_scale(peak.amax().expand(peak.shape) if shared_by == "tensor" else peak)
        found[kind, layer] = scale * 127 / (2 ** (bits - 1) - 1)
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
            model(**batch, past_key_values=PeakCache(peaks), use_cache=True)

    def measured(bits: int, shared_by: str) -> float:
        scales = scales_of(peaks, shared_by, bits)

        def call(input_ids: Tensor) -> Any:
            return model(input_ids=input_ids, past_key_values=FakeQuantizedCache(scales, bits), use_cache=True)

        return perplexity(call, pieces, label=f"{bits} bits, {shared_by}")

    rows = [dict(bits=32, peak="", perplexity=perplexity(model, pieces, label="float"))]
    rows += [
        dict(bits=bits, peak=peak, perplexity=measured(bits, peak))
        for bits in (8, 4)
        for peak in ("channel", "pair", "tensor")
    ]
    table = Table("bits", "peak of a channel", "perplexity")
    for row in rows:
        table.add_row(str(row["bits"]), str(row["peak"]), f"{row['perplexity']:.2f}")
    print_table(table)
    OUT.write_text(json.dumps(dict(versions=versions(), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
