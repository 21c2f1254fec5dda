"""QuantizeKV: keys and values of every attention in 4 or 8 bits.

Source: QServe, arXiv:2405.04532 sec. 4.2 (asymmetric, dynamic, keys after the rotary embedding);
        Hadamard on queries and keys: QuaRot, arXiv:2404.00456 stage 1d. The mean of keys taken out:
        SageAttention, arXiv:2410.02367 sec. 4.2 (there of the call at hand, here of the calibration).
Law:    k ~ s (q - z) within s for each channel of a head and token; with `hadamard` H k is rounded
        instead, and q k^T = (H q)(H k)^T. With `center` k - c is rounded and c added back, for a
        constant c of each head: keys have a mean that is larger than what tells tokens apart.
        With `fixed` k ~ s q within s / 2, one s for a channel of a head and all tokens, no zero points:
        what ONNX Runtime's attention reads. A rotary embedding turns pairs (a, b) of channels by an angle
        that grows with the position, so the largest |a| of short texts is not that of long ones; the
        norm is: s = sqrt(max a^2 + max b^2) / 127 for both. (Ours. SmolLM2 calibrated on texts of 512 tokens, read
        2048: perplexity 24.15 float, 24.22 so, 25.61 with max |a| / 127; benches/fixed_scales.py.)
Needs:  nothing; with `center` the mean key of every head, with `fixed` the largest of each channel.
Leaves: nothing. In a graph the rounding stands before the attention; on a module it is done by the cache that
        every call then gets (qcompile/modules/kv_cache.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.analysis.attention_scores import AttentionMatmul, mixed_channels, products
from qcompile.analysis.obstacle import Obstacle
from qcompile.calibration.statistics import Statistics
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import rotation
from qcompile.passes.qdq.site_plan import EXACT
from qcompile.recipe.recipe import RecipeError
from qcompile.recipe.registry import rewrites
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile


@dataclass(frozen=True)
class QuantizeKV:
    """How keys and values are rounded.

    Attributes:
        bits: 4 or 8. hadamard: turn keys first. center: take their mean out before that.
        sink_tokens: first tokens that stay float. static: scales of channels, from calibration, instead of tokens.
        optional: for a model without a cache, and in a file whose runtime cannot read such a one, leave it out
            (the report says so) instead of refusing.
    """

    bits: int = 4
    hadamard: bool = False
    sink_tokens: int = 0
    center: bool = False
    static: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"QuantizeKV: bits must be 4 or 8, got {self.bits}")
        if self.sink_tokens < 0:
            raise RecipeError(f"QuantizeKV: sink_tokens counts tokens, got {self.sink_tokens}")
        if self.static and (self.bits != 8 or self.hadamard or self.center or self.sink_tokens):
            raise RecipeError(
                "QuantizeKV: fixed scales are of 8 bits, and go with none of hadamard, center, sink_tokens: "
                "QuantizeKV(8, static=True)"
            )

    @property
    def format(self) -> Format:
        """Of a head's vector."""
        return Format("int4" if self.bits == 4 else "int8", "row", zero="int")


@rewrites(
    QuantizeKV,
    exact=False,
    needs=lambda config: ("keys",) if config.center or config.static else (),
    after=(*EXACT, "IntactKV"),
)
def quantize_kv(program: Program, config: QuantizeKV, statistics: Statistics) -> PassReport:
    """Insert the rounding before every attention, in place."""
    report = PassReport("QuantizeKV")
    found = products(program)
    scales = [_fixed_scales(program, p, statistics, report) for p in found] if config.static else []
    for index, product in enumerate(found):
        keys, values = product.keys, product.values
        center = None
        if config.center:
            report.tensors[f"{index}.center"] = mean = statistics.key_means[keys.name]
            center = program.add_weight(f"keys.{index}.center", mean.to(keys.meta["val"].device))
        if product.turned:
            keys = program.insert(aten.transpose.int, (keys, -1, -2), before=product.node)
        if config.static:
            turned, rounded = (
                _round_fixed(program, x, report, f"{index}.{part}_scale", scale, before)
                for x, part, scale, before in zip(
                    (keys, values), ("key", "value"), scales[index], (product.node, product.consumer), strict=True
                )
            )
        else:
            turned = _round(program, keys, config, product.node, turn=config.hadamard, center=center)
            rounded = _round(program, values, config, product.consumer, turn=False)
        if product.turned:
            turned = program.insert(aten.transpose.int, (turned, -1, -2), before=product.node)
        _replace_argument(product.node, 1, turned)
        _replace_argument(product.consumer, product.values_at, rounded)
        report.done.append(product.node.name)
    kind = "int8, a scale for each channel" if config.static else str(config.format)
    report.notes.append(f"{len(report.done)} attentions, {kind}")
    return report


def fixed_scale(absmax: Tensor, mixed: Tensor | None = None) -> Tensor:
    """Scales of int8 channels.

    Args:
        absmax: [H, D] of each channel. mixed: [H, D] equal numbers for channels that a rotation mixes; None: for none.

    Returns:
        [H, D] float32; 1 / 127 for channels that are zero.
    """
    peak = absmax.double()
    if mixed is not None:
        same = (mixed[:, :, None] == mixed[:, None, :]).double()  # within a head
        peak = (same @ peak.square()[..., None]).squeeze(-1).sqrt()
    return (torch.where(peak > 0, peak, torch.ones_like(peak)) / 127).float()


def _fixed_scales(
    program: Program, product: AttentionMatmul, statistics: Statistics, report: PassReport
) -> tuple[Tensor, Tensor]:
    """Of keys and of values; found before anything is inserted that the flow would meet."""
    mixed = mixed_channels(program, product)
    if isinstance(mixed, Obstacle):
        report.notes.append(f"{product.node.name}: scales hold for the positions of the calibration ({mixed.reason})")
        mixed = None
    keys = fixed_scale(statistics.cached[product.keys.name], mixed)
    return keys, fixed_scale(statistics.cached[product.values.name])


def _round_fixed(
    program: Program, x: torch.fx.Node, report: PassReport, name: str, scale: Tensor, before: torch.fx.Node
) -> torch.fx.Node:
    report.tensors[name] = scale
    held = program.add_weight(f"cache.{name}", scale.to(x.meta["val"].device))
    dtype = x.meta["val"].dtype

    def run(x: Tensor, scale: Tensor) -> Tensor:
        step = scale[:, None]  # [H, 1, D]
        return ((x.float() / step).round().clamp(-128, 127) * step).to(dtype)

    done: torch.fx.Node = program.inline(run, (x, held), before=before)
    return done


def _round(
    program: Program,
    x: torch.fx.Node,
    config: QuantizeKV,
    before: torch.fx.Node,
    *,
    turn: bool,
    center: torch.fx.Node | None = None,
) -> torch.fx.Node:
    form, dtype, intact = config.format, x.meta["val"].dtype, config.sink_tokens
    args = [x]
    if turn:
        width = int(x.meta["val"].shape[-1])
        name = f"keys{width}.turn"
        if name not in program.weights:
            program.add_weight(name, rotation(width, 0)[0].float().to(x.meta["val"].device))
        args.append(program.node_of(name))
    if center is not None:
        args.append(center)

    def run(x: Tensor, *more: Tensor) -> Tensor:
        wide, rest = x.float(), list(more)
        matrix = rest.pop(0) if turn else None
        mean = rest.pop(0)[:, None] if rest else None  # [H, 1, D]
        wide = wide if mean is None else wide - mean
        codes, scale, zero = ops.quantize(wide if matrix is None else wide @ matrix, str(form))
        numbers = ops.dequantize(codes, scale, zero, None, str(form), 0, torch.float32)
        back = numbers if matrix is None else numbers @ matrix.t()
        back = (back if mean is None else back + mean).to(dtype)
        if not intact:
            return back
        position = torch.arange(x.shape[-2], device=x.device)[:, None]
        return torch.where(position < intact, x, back)

    done: torch.fx.Node = program.inline(run, args, before=before)
    return done


def _replace_argument(node: torch.fx.Node, at: int, new: torch.fx.Node) -> None:
    node.args = (*node.args[:at], new, *node.args[at + 1 :])
