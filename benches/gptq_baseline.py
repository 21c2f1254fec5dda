"""A straightforward GPTQ by hooks: the baseline of benches/quantize_cost.py.

Layer after layer, as in the paper (Frantar et al. 2022, arXiv:2210.17323, algorithm 1): the batches go through a layer
once for the Hessians of all its linears and once more, quantized, for the next layer's inputs. The format is that of
`w4a16-gptq`: int4 in groups of 128 with zero points, a search for the clip of each group by sum |e|^2.4, act-order on
static groups. What that preset does beyond this, an int8 lm_head and factors in float64, this loop does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GROUP, BLOCK, DAMPING = 128, 128, 0.01


class _InputsCaught(Exception):
    """The inputs of the first layer are known: the forward pass can stop."""


def baseline_gptq(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
    """Replace the weights of all linears in the longest list of layers by their dequantized int4 values."""
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    with torch.no_grad():
        inputs = _first_inputs(model, layers[0], batches)
        for layer in layers:
            hessians = _hessians(layer, inputs)
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear):
                    linear.weight.copy_(quantize(linear.weight, hessians[name]))
            inputs = [(layer(x, **more), more) for x, more in inputs]


def _first_inputs(model: nn.Module, layer: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[Any]:
    found: list[Any] = []

    def catch(_: nn.Module, args: tuple[Tensor], more: dict[str, Any]) -> None:
        found.append((args[0], more))
        raise _InputsCaught

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except _InputsCaught:
            pass
    handle.remove()
    return found


def _hessians(layer: nn.Module, inputs: Sequence[Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        found[name] = found.get(name, torch.zeros(rows.shape[1], rows.shape[1])) + rows.t() @ rows

    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, linear in layer.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    for x, more in inputs:
        layer(x, **more)
    for handle in handles:
        handle.remove()
    return found


def quantize(weight: Tensor, hessian: Tensor) -> Tensor:
    """GPTQ of a weight [N, K] under a Hessian [K, K], both float32; returns the dequantized values [N, K]."""
    order = hessian.diagonal().argsort(descending=True)
    grids = [[g[:, None].expand(part.shape) for g in _clipped(part)] for part in weight.split(GROUP, 1)]
    scale, zero = (torch.cat(parts, 1)[:, order] for parts in zip(*grids, strict=True))
    w, h = weight[:, order].clone(), hessian[order][:, order]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rounded = torch.empty_like(w)
    for first in range(0, w.shape[1], BLOCK):
        last = min(first + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, first:last])
        for k in range(first, last):
            rounded[:, k] = _round(w[:, k], scale[:, k], zero[:, k])
            error = (w[:, k] - rounded[:, k]) / upper[k, k]
            w[:, k:last] -= error[:, None] * upper[k, k:last]
            errors[:, k - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return rounded[:, order.argsort()]


def _round(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((w / scale).round().add(zero).clamp(0, 15) - zero) * scale


def _clipped(group: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [N] and zero points [N] of a group [N, G]: of 21 clips, the one with the least sum |e|^2.4."""
    low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
    best, zeros, least = torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)
    for shrink in range(21):
        scale = ((high - low) * (1 - shrink / 100) / 15).clamp_min(1e-12)
        zero = (-low * (1 - shrink / 100) / scale).round()
        error = (group - _round(group, scale[:, None], zero[:, None])).abs().pow(2.4).sum(1)
        better = error < least
        best, zeros = torch.where(better, scale, best), torch.where(better, zero, zeros)
        least = torch.where(better, error, least)
    return best, zeros
