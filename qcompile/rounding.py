"""Rounding numbers to a format: ranges, clip search, codes, and the grid that codes stand on.

|w - dq(q(w))| <= s / 2 inside the range, for every format of integers; a float's step is relative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qcompile.formats import Format, QTensor, group_columns, spread, ungroup_columns
from qcompile.minifloat import constrain, decode_e2m1, encode_e2m1, power_of_two

_TINY = 1e-30  # a smaller range is zero: x / s must not become infinite
_PIVOT = 8.0  # a token whose largest value is this many times the median token's is a pivot
_PROTECTED = 119.0  # level-1 codes of a dual format: level 2 may round one int4 step past them


def quantize_tensor(x: Tensor, format: Format, *, clip: bool = False, hessian: Tensor | None = None) -> QTensor:
    """Round to nearest in a format.

    Args:
        x: float, [.., K].
        format: the format.
        clip: shrink each range to the one of 20 that minimises sum |e|^2.4 (GPTQ's MSE clip).
        hessian: [K, K] second moments of the inputs of a weight [N, K]: with `clip`, minimise instead
            what the errors of a group do to the product, e H e^T with the group's block of H. (One
            range for the whole tensor is always judged by sum |e|^2.4.)

    Raises:
        ValueError: x holds NaN or Inf.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"the tensor holds {int((~torch.isfinite(x)).sum())} NaN or Inf of {x.numel()} values")
    wide = x.float()
    search = _Search(None if hessian is None else diagonal_blocks(hessian, format)) if clip else None
    if format.dual:
        return _quantize_dual(wide, format, search)
    if format.smooth:
        return _quantize_smooth(wide, format)
    groups = group_columns(wide, format)
    low, high = _range(groups, format)
    if search is not None:
        low, high = search.ranges(groups, low, high, format)
    scale, zero = _scale(low, high, format)
    if format.powers:
        return _quantize_powers(groups, scale, x.shape[-1], format)
    shape = x.shape[:-1] + (format.groups(x.shape[-1]),) if format.per != "tensor" else ()
    codes = encode(groups, scale[..., None], None if zero is None else zero[..., None], format)
    codes = codes.reshape(x.shape) if format.per == "tensor" else ungroup_columns(codes, x.shape[-1])
    stored_zero = None
    if zero is not None:
        stored_zero = (zero.to(torch.uint8) if format.zero == "int" else zero).reshape(shape)
    return QTensor(codes.contiguous(), scale.reshape(shape), stored_zero, None, format)


def _range(groups: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    if format.zero == "none":
        high = groups.abs().amax(-1)
        return -high, high
    return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)


def _scale(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    scale = high / format.reach if format.zero == "none" else (high - low) / format.qmax
    scale = torch.where(scale > _TINY, scale, torch.ones_like(scale))
    if format.zero == "none":
        return scale, None
    zero = -low / scale
    return scale, zero.round().clamp(0, format.qmax) if format.zero == "int" else zero


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """x / scale -> codes, rounding half to even."""
    if format.dtype == "fp8":
        return (x / scale).clamp(-format.reach, format.reach).to(torch.float8_e4m3fn)
    if format.dtype == "fp4":
        return encode_e2m1(x / scale)
    if zero is None:
        return (x / scale).round_().clamp_(format.qmin, format.qmax).to(torch.int8)
    # Round before adding an integer zero (the law), after adding a real one.
    steps = (x / scale).round_() + zero if format.zero == "int" else (x / scale + zero).round_()
    return steps.clamp_(format.qmin, format.qmax).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """Codes -> float32, for scales and zeros of the codes' shape; the inverse of `encode`."""
    value = decode_e2m1(codes) if format.dtype == "fp4" else codes.float()
    return (value if zero is None else value - zero) * scale


def level_grid(q: QTensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The grid that each number of a matrix was rounded on: scale, zero, least and greatest code, [N, K].

    Least and greatest are given only where they bind more tightly than the format's own (dual).
    """
    shape, form = q.codes.shape, q.format
    if form.powers:
        assert q.group_scale is not None
        return q.scale * spread(power_of_two(q.group_scale), form, q.columns), None, None, None
    scale = spread(q.scale, form, q.columns) if not form.dual else q.scale
    zero = None if q.zero is None else spread(q.zero, form, q.columns).float()
    zero = None if zero is None else zero.expand(shape)
    if not form.dual:
        return scale.expand(shape), zero, None, None
    assert q.group_scale is not None and zero is not None
    group = spread(q.group_scale, form, q.columns).float()
    reach = (127 / group).floor()
    low, high = (zero - reach).clamp_min(0), (zero + reach).clamp_max(form.qmax)
    return scale * group, zero, low.to(torch.uint8), high.to(torch.uint8)


def diagonal_blocks(hessian: Tensor, format: Format) -> Tensor | None:
    """The block of H [K, K] that belongs to each group, float32 [groups, G, G]; padded columns weigh nothing."""
    if format.per == "tensor":
        return None
    if format.per == "row":
        return hessian.float()[None]
    pad = -len(hessian) % format.group
    padded = torch.nn.functional.pad(hessian.float(), (0, pad, 0, pad))
    count = len(padded) // format.group
    return torch.stack([padded.chunk(count, 0)[i].chunk(count, 1)[i] for i in range(count)])


class _Search:
    """How much of each range to keep: what an error costs, and which shares are tried."""

    def __init__(self, blocks: Tensor | None) -> None:
        self.blocks = blocks
        # Correlated errors cancel, so that a Hessian asks for far tighter ranges than |e|^2.4 does:
        # sixteenths down to a half, then sixty-fourths around the best of them.
        self.shares = [1 - i / 100 for i in range(1, 21)] if blocks is None else [1 - i / 16 for i in range(1, 9)]
        self.around = [] if blocks is None else [i / 64 for i in (-3, -2, -1, 1, 2, 3)]

    def cost(self, error: Tensor) -> Tensor:
        """Of each group, [N, groups] of [N, groups, G]; the error is overwritten."""
        if self.blocks is None:
            return error.abs_().pow_(2.4).sum(-1)
        of_groups = error.transpose(0, 1)
        return ((of_groups @ self.blocks).mul_(of_groups)).sum(-1).t()

    def share(self, cost_of: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """For each group, [N, groups] as `like`, the share of its range with the least cost."""
        best = torch.ones_like(like)
        least = cost_of(best)

        def attempt(tried: Tensor) -> None:
            nonlocal best, least
            cost = cost_of(tried)
            best = torch.where(cost < least, tried, best)
            least = torch.minimum(cost, least)

        for share in self.shares:
            attempt(torch.full_like(like, share))
        middle = best
        for step in self.around:
            attempt((middle + step).clamp(max=1))
        return best

    def ranges(self, groups: Tensor, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """The best ranges of all groups."""
        rows = groups.flatten(0, -3) if groups.ndim > 2 else groups[None]
        lows, highs = low.reshape(rows.shape[:-1]), high.reshape(rows.shape[:-1])
        step = max(1, 2**18 // max(1, rows[0].numel()))  # what a core holds near it

        def cost_of(keep: Tensor, part: Tensor, low: Tensor, high: Tensor) -> Tensor:
            scale, zero = _scale(low * keep, high * keep, format)
            z = None if zero is None else zero[..., None]
            codes = encode(part, scale[..., None], z, format)
            return self.cost(decode(codes, scale[..., None], z, format) - part)

        pieces = list(zip(rows.split(step), lows.split(step), highs.split(step), strict=True))
        keep = torch.cat([self.share(partial(cost_of, part=p, low=a, high=b), a) for p, a, b in pieces])
        keep = keep.reshape(low.shape)
        return low * keep, high * keep


def _quantize_powers(groups: Tensor, scale: Tensor, columns: int, format: Format) -> QTensor:
    """Codes on scales that are powers of two, or powers of two below the row's."""
    row, exponent = constrain(scale, format.powers)
    codes = encode(groups, (row * power_of_two(exponent))[..., None], None, format)
    return QTensor(ungroup_columns(codes, columns).contiguous(), row, None, exponent, format)


def _quantize_smooth(x: Tensor, format: Format) -> QTensor:
    """Activations [.., T, K]: r for a group of channels over all tokens, then s for each token.

    Pivot tokens, whose values are far above all others, are left out of r: one of them would shrink
    every other token's codes in its channels. Their own s covers them.
    """
    groups = group_columns(x, format)
    peaks = groups.abs().amax(-1)  # [.., T, groups]
    token = peaks.amax(-1, keepdim=True)
    ordinary = token <= _PIVOT * token.median(-2, keepdim=True).values if x.ndim > 1 else torch.ones_like(token) > 0
    smooth = (peaks * ordinary).amax(-2, keepdim=True) if x.ndim > 1 else torch.ones_like(peaks)
    smooth = torch.where(smooth > _TINY, smooth, torch.ones_like(smooth))
    scale = (peaks / smooth).amax(-1, keepdim=True) / format.reach * smooth
    scale = torch.where(scale > _TINY, scale, torch.ones_like(scale))
    codes = encode(groups, scale[..., None], None, format)
    return QTensor(ungroup_columns(codes, x.shape[-1]).contiguous(), scale, None, None, format)


def _quantize_dual(x: Tensor, format: Format, search: _Search | None) -> QTensor:
    """Two levels: int8 for a row inside the protective range, then int4 with integer group scales."""
    high = x.abs().amax(-1, keepdim=True)
    scale = torch.where(high > _TINY, high / _PROTECTED, torch.ones_like(high))
    wide = group_columns(x / scale, format)
    # Rounding keeps order: the extremes of the level-1 codes are the rounded extremes.
    top, bottom = wide.amax(-1).round_().clamp_min_(0), wide.amin(-1).round_().clamp_max_(0)
    keep = torch.ones_like(top)
    if search is not None:
        keep = search.share(
            lambda keep: search.cost(_level_error(wide, *_second_level(wide, bottom * keep, top * keep))), top
        )
    group_scale, zero, codes = _second_level(wide, bottom * keep, top * keep)
    return QTensor(
        ungroup_columns(codes, x.shape[-1]).to(torch.uint8).contiguous(),
        scale,
        zero.to(torch.uint8),
        group_scale.to(torch.int8),
        format,
    )


def _second_level(wide: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integer scale and zero of each group for a range, and the codes, in units of level 1."""
    group_scale = ((top - bottom) / 15).round_().clamp_min_(1)
    zero = (-bottom / group_scale).round_().clamp_(0, 15)
    # q - z stays where s1 (q - z) fits int8; for protected codes this binds only at the very edge.
    reach = (127 / group_scale).floor_()
    # Round once, from the real numbers, not from level 1.
    codes = (wide / group_scale[..., None]).round_().add_(zero[..., None])
    codes.clamp_((zero - reach).clamp_min_(0)[..., None], (zero + reach).clamp_max_(15)[..., None])
    return group_scale, zero, codes


def _level_error(wide: Tensor, group_scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
    return ((codes - zero[..., None]) * group_scale[..., None]).sub_(wide)
