"""GPTQ as one writes it in an afternoon: the peer that benches/quantize_cost.py times ours against.

Layer after layer by hooks, as in the paper (Frantar et al. 2022, arXiv:2210.17323, algorithm 1): the
batches go through a layer once for the Hessians of all its linears and once more, quantized, for the
next layer's inputs. The same settings as `w4a16-gptq`: int4 in groups of 128 without zero points, a
search for each group's clip by sum |e|^2.4, columns by falling diagonal on static groups.
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
    scale = torch.cat([_clipped(part)[:, None].expand(part.shape) for part in weight.split(GROUP, 1)], 1)[:, order]
    w, h = weight[:, order].clone(), hessian[order][:, order]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rounded = torch.empty_like(w)
    for first in range(0, w.shape[1], BLOCK):
        last = min(first + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, first:last])
        for k in range(first, last):
            rounded[:, k] = (w[:, k] / scale[:, k]).round().clamp(-8, 7) * scale[:, k]
            error = (w[:, k] - rounded[:, k]) / upper[k, k]
            w[:, k:last] -= error[:, None] * upper[k, k:last]
            errors[:, k - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return rounded[:, order.argsort()]


def _clipped(group: Tensor) -> Tensor:
    """For each row of [N, group] the scale, of twenty below the largest, with the least sum |e|^2.4."""
    whole = group.abs().amax(1) / 7
    best, least = whole.clone(), torch.full_like(whole, torch.inf)
    for shrink in range(21):
        scale = (whole * (1 - shrink / 100)).clamp_min(1e-12)
        error = (group - (group / scale[:, None]).round().clamp(-8, 7) * scale[:, None]).abs().pow(2.4).sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
