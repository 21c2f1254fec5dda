"""GPTQ as one writes it in an afternoon: the peer that benches/quantize_cost.py times ours against.

Layer after layer by hooks, as in the paper (Frantar et al. 2022, arXiv:2210.17323, algorithm 1): the
batches go through a layer once for the Hessians of all its linears and once more, quantized, for the
next layer's inputs. As `w4a16-gptq` does it: int4 in groups of 128 with zero points, a search for each
group's clip by sum |e|^2.4, columns by falling diagonal on static groups. What that preset does beyond
this, the logits in int8 and factors in float64, this loop does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GROUP, BLOCK, DAMPING = 128, 128, 0.01


class _Caught(Exception):
    """The first layer's inputs are known: no need to run on."""


def plain_gptq(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
    """Put GPTQ's int4 values in place of the weights of all linears in the longest list of layers."""
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
        raise _Caught

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except _Caught:
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
    """The weight [N, K] in int4's values by GPTQ under `hessian` [K, K], float32."""
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
    """For each row of [N, group] the scale, of twenty below the largest, with the least sum |e|^2.4; its zero point."""
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
