"""QuantizeKV: keys and values of every attention in 4 or 8 bits.

Source: QServe, arXiv:2405.04532 sec. 4.2 (asymmetric, dynamic, keys after the rotary embedding);
        Hadamard on queries and keys: QuaRot, arXiv:2404.00456 stage 1d. The mean of keys subtracted:
        SageAttention, arXiv:2410.02367 sec. 4.2 (there of the call at hand, here of the calibration).
Law:    k ~ s (q - z) within s for each channel of a head and token; with `hadamard` H k is rounded
        instead, and q k^T = (H q)(H k)^T. With `center` k - c is rounded and c added back, for a
        constant c of each head: keys have a mean that is larger than what tells tokens apart.
        With `static` k ~ s q within s / 2, s of a channel of a head for all tokens, no zero points:
        what ONNX Runtime's attention reads. A rotary embedding rotates pairs (a, b) of channels by an angle
        that grows with the position, so the largest |a| of short texts is not that of long ones; the
        norm is: s = sqrt(max a^2 + max b^2) / 127 for both. (Ours. SmolLM2 calibrated on texts of 512 tokens, read
        2048: perplexity 24.15 float, 24.22 so, 25.61 with max |a| / 127; benches/static_kv_scales.py.)
        With `fp8` k ~ s e4m3(k / s), s a 448th of the largest such peak of the layer or of the head, rounded up to
        bfloat16: what servers' caches read from checkpoints.
Keeps:  nothing exactly. In a graph the rounding stands before the attention; on a module it is done by the cache
        that every call then gets (qcompile/modules/kv_cache.py).
Needs:  nothing; with `center` the mean key of every head, with `static` the absmax of each channel.
Skips:  nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qcompile.analysis.attention_scores import AttentionMatmul, mixed_channels
from qcompile.analysis.obstacle import Obstacle
from qcompile.ir.aten_ops import aten
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_rotation
from qcompile.numerics.qparams import dequantize_with_qparams, quantize_with_qparams
from qcompile.recipe.pass_config import ONLY_WHERE_SET, PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import KVConstants, PassReport
from qcompile.recipe.rule import RecipeError

ops = torch.ops.qcompile


@dataclass(frozen=True)
class QuantizeKV(PassConfig):
    """How keys and values are rounded."""

    # Bits of a code, 4 or 8. 4 is the paper's KV4: a quarter of the bytes of float16.
    bits: int = 4
    # Rotate keys by a Hadamard matrix before they are rounded, which spreads their outlier channels.
    hadamard: bool = False
    # How many first tokens of a text (attention sinks) stay float.
    sink_tokens: int = 0
    # Subtract the mean key of each head, from calibration, before keys are rotated and rounded.
    center: bool = False
    # A scale for each channel, from calibration, instead of a scale and a zero point for each token. 8 bits only.
    static: bool = False
    # For a model without a cache, and in a file whose runtime cannot read a quantized one: keep the cache float and
    # say so in the report, instead of refusing.
    optional: bool = False
    # With static: e4m3 codes with one scale for the keys of a layer and one for its values ("tensor"), or for each head
    # ("head"), as servers have them. "": int8 with a scale for each channel.
    fp8: Literal["", "tensor", "head"] = field(default="", metadata=ONLY_WHERE_SET)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"QuantizeKV: bits must be 4 or 8, got {self.bits}")
        if self.sink_tokens < 0:
            raise RecipeError(f"QuantizeKV: sink_tokens must not be negative, got {self.sink_tokens}")
        if self.static and (self.bits != 8 or self.hadamard or self.center or self.sink_tokens):
            raise RecipeError(
                "QuantizeKV: static scales are of 8 bits, and go with none of hadamard, center, sink_tokens. "
                "Fix: QuantizeKV(8, static=True)"
            )
        if self.fp8 not in ("", "tensor", "head") or (self.fp8 and not self.static):
            raise RecipeError(
                f"QuantizeKV: fp8={self.fp8!r} with static={self.static}. "
                "Fix: QuantizeKV(8, static=True, fp8='tensor'), or fp8='head'"
            )

    @property
    def format(self) -> Format:
        """Of a head's vector."""
        return Format("int4" if self.bits == 4 else "int8", "row", zero="int")


@rewrites(
    QuantizeKV,
    Stage.KV_CACHE,
    exact=False,
    needs=lambda config: ("keys",) if config.center or config.static else (),
)
def quantize_kv(program: Program, config: QuantizeKV, context: PassContext) -> PassReport:
    """Insert the rounding before every attention, in place."""
    report = PassReport("QuantizeKV")
    attentions = context.facts.attentions
    scales = [_static_scales(program, a, config, context, report) for a in attentions] if config.static else []
    centers = [context.statistics.key_means[attention.keys.name] for attention in attentions] if config.center else []
    for index, attention in enumerate(attentions):
        keys, values = attention.keys, attention.values
        if attention.keys_transposed:
            keys = program.insert(aten.transpose.int, (keys, -1, -2), before=attention.node)
        if config.static:
            key_scale, value_scale = scales[index]
            at, of_value = attention.node, attention.value_product
            keys = _round_static(program, keys, f"cache.{index}.key_scale", key_scale, at, config)
            values = _round_static(program, values, f"cache.{index}.value_scale", value_scale, of_value, config)
        else:
            center = None
            if config.center:
                device = keys.meta["val"].device
                center = program.add_weight(f"keys.{index}.center", centers[index].to(device))
            keys = _round(program, keys, config, attention.node, rotate=config.hadamard, center=center)
            values = _round(program, values, config, attention.value_product, rotate=False)
        if attention.keys_transposed:
            keys = program.insert(aten.transpose.int, (keys, -1, -2), before=attention.node)
        _replace_argument(attention.node, 1, keys)
        _replace_argument(attention.value_product, attention.values_at, values)
        report.done.append(attention.node.name)
    report.constants = KVConstants(
        centers=tuple(centers), key_scales=tuple(k for k, _ in scales), value_scales=tuple(v for _, v in scales)
    )
    kind = "int8, a static scale for each channel" if config.static else str(config.format)
    kind = f"fp8, a static scale for each {config.fp8}" if config.fp8 else kind
    report.notes.append(f"{len(report.done)} attentions, {kind}")
    return report


def static_scale(absmax: Tensor, mixed: Tensor | None = None) -> Tensor:
    """Scales of int8 channels.

    Args:
        absmax: [H, D] of each channel.
        mixed: [H, D] the class of each channel, one for all that a rotation mixes; None: no rotation.

    Returns:
        [H, D] float32; 1 / 127 for channels that are 0.
    """
    peak = _peak(absmax, mixed)
    return (torch.where(peak > 0, peak, torch.ones_like(peak)) / 127).float()


def served_scale(absmax: Tensor, mixed: Tensor | None, per: str) -> Tensor:
    """Scales of e4m3 codes; arguments as of `static_scale`.

    Returns:
        [H, D] float32 of values of bfloat16, all the same ("tensor") or the same within a head ("head").
    """
    peak = _peak(absmax, mixed)
    largest = (peak.amax() if per == "tensor" else peak.amax(-1, keepdim=True)) / Format("fp8").max_value
    exact = torch.where(largest > 0, largest, torch.ones_like(largest)).float()
    short = exact.bfloat16()
    above = (short.view(torch.int16) + 1).view(torch.bfloat16).float()  # the next value, of positive ones
    return torch.where(short.float() < exact, above, short.float()).expand_as(peak).contiguous()


def _peak(absmax: Tensor, mixed: Tensor | None) -> Tensor:
    """The largest value that a channel can have, float64 [H, D]."""
    peak = absmax.double()
    if mixed is not None:
        same = (mixed[:, :, None] == mixed[:, None, :]).double()  # within a head
        peak = (same @ peak.square()[..., None]).squeeze(-1).sqrt()
    return peak


def _static_scales(
    program: Program, attention: AttentionMatmul, config: QuantizeKV, context: PassContext, report: PassReport
) -> tuple[Tensor, Tensor]:
    """Of keys and of values; found before anything is inserted, which the analysis would meet."""
    mixed: Tensor | None = None
    found = mixed_channels(program, attention)
    if isinstance(found, Obstacle):
        report.notes.append(
            f"{attention.node.name}: static scales hold for the positions of the calibration only ({found.reason})"
        )
    else:
        mixed = found
    absmax = context.statistics.cached
    keys, values = absmax[attention.keys.name], absmax[attention.values.name]
    if config.fp8:
        return served_scale(keys, mixed, config.fp8), served_scale(values, None, config.fp8)
    return static_scale(keys, mixed), static_scale(values)


def _round_static(
    program: Program, x: torch.fx.Node, name: str, scale: Tensor, before: torch.fx.Node, config: QuantizeKV
) -> torch.fx.Node:
    stored = program.add_weight(name, scale.to(x.meta["val"].device))
    dtype = x.meta["val"].dtype

    def run(x: Tensor, scale: Tensor) -> Tensor:
        by_channel = scale[:, None]  # [H, 1, D]
        if config.fp8:
            form = Format("fp8")
            codes = quantize_with_qparams(x.float(), by_channel, None, form)
            return dequantize_with_qparams(codes, by_channel, None, form).to(dtype)
        return ((x.float() / by_channel).round().clamp(-128, 127) * by_channel).to(dtype)

    done: torch.fx.Node = program.inline(run, (x, stored), before=before)
    return done


def _round(
    program: Program,
    x: torch.fx.Node,
    config: QuantizeKV,
    before: torch.fx.Node,
    *,
    rotate: bool,
    center: torch.fx.Node | None = None,
) -> torch.fx.Node:
    form, dtype, sinks = config.format, x.meta["val"].dtype, config.sink_tokens
    args = [x]
    if rotate:
        width = int(x.meta["val"].shape[-1])
        name = f"keys{width}.rotation"
        if name not in program.weights:
            program.add_weight(name, random_rotation(width, 0)[0].float().to(x.meta["val"].device))
        args.append(program.node_of(name))
    if center is not None:
        args.append(center)

    def run(x: Tensor, *more: Tensor) -> Tensor:
        wide, rest = x.float(), list(more)
        matrix = rest.pop(0) if rotate else None
        mean = rest.pop(0)[:, None] if rest else None  # [H, 1, D]
        wide = wide if mean is None else wide - mean
        codes, scale, zero = ops.quantize(wide if matrix is None else wide @ matrix, str(form))
        dequantized = ops.dequantize(codes, scale, zero, None, str(form), 0, torch.float32)
        back: Tensor = dequantized if matrix is None else dequantized @ matrix.t()
        back = (back if mean is None else back + mean).to(dtype)
        if not sinks:
            return back
        position = torch.arange(x.shape[-2], device=x.device)[:, None]
        kept: Tensor = torch.where(position < sinks, x, back)
        return kept

    done: torch.fx.Node = program.inline(run, args, before=before)
    return done


def _replace_argument(node: torch.fx.Node, at: int, new: torch.fx.Node) -> None:
    node.args = (*node.args[:at], new, *node.args[at + 1 :])
