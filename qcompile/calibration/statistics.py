"""Calibration: statistics streamed through a program, node by node, never activations kept.

One batch at a time runs through the graph; values are freed after their last use, and a statistic
is updated as its node is computed. What stays is one vector for each watched value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from qcompile.analysis.attention_scores import products
from qcompile.analysis.scale_folding import groups_of_consumers
from qcompile.analysis.sites import find_sites
from qcompile.ir.program import Program

_PIVOTS = 4  # first tokens of a sequence, which carry massive activations


class CalibrationError(ValueError):
    """Calibration data that cannot be used; the text names the batch or the site and the mend."""


@dataclass
class Statistics:
    """What calibration saw, by the name of the graph node: on the CPU, wherever the model is.

    Attributes:
        absmax: node name -> max |value| for each channel, [K] float32.
        keys: node name -> max |key| of a sequence for each head and channel of an attention, the mean
            over sequences, [heads, D] float32.
        key_means: the mean key of an attention, [heads, D] float32.
        cached: node name -> max |key| or |value| of all tokens for each head and channel, [heads, D] float32.
        batches: how many batches were seen.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    key_means: dict[str, Tensor] = field(default_factory=dict)
    cached: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0


def observe(
    program: Program, batches: Iterable[Sequence[Any]], *, sites: bool = True, progress: bool = False
) -> Statistics:
    """Stream batches through a program and gather the absmax of every site's input, of all keys and values.

    Args:
        program: the program. batches: flat inputs of the program, one sequence for each batch.
        sites: whether inputs of sites are wanted; if not, less is computed. progress: show a bar.

    Raises:
        CalibrationError: no batch at all, or NaN or Inf in the input of a site, a key or a value.
    """
    seen = Statistics()
    groups = groups_of_consumers(find_sites(program)) if sites else []
    label = {g.root: (g.sites[0].name if g.sites else g.root.name) for g in groups}
    turned = {p.keys: p.turned for p in products(program)}
    cached = {p.values: False for p in products(program)} | turned

    def check(node: Any, peak: Tensor, where: str) -> None:
        if not bool(torch.isfinite(peak).all()):
            raise CalibrationError(
                f"batch {seen.batches + 1} brings NaN or Inf to {where} (node {node.name}): "
                "drop that batch, or calibrate in float32"
            )

    def see(node: Any, value: Any) -> None:
        if node in cached:
            vectors = value.detach().transpose(-1, -2) if cached[node] else value.detach()
            peak = _by_head(vectors).abs().amax(-2).flatten(0, -3).amax(0).float().cpu()
            check(node, peak, "an attention")
            seen.cached[node.name] = torch.maximum(seen.cached.get(node.name, peak), peak)
        if node in turned:
            for held, of in ((seen.keys, _key_peak), (seen.key_means, _key_mean)):
                held[node.name] = held.get(node.name, 0) + of(vectors).cpu()
        if node not in label:
            return
        peak = value.detach().abs().flatten(0, -2).amax(0).float().cpu()
        check(node, peak, label[node])
        old = seen.absmax.get(node.name)
        seen.absmax[node.name] = peak if old is None else torch.maximum(old, peak)

    for batch in track(batches, "calibrating", disable=not progress, transient=True):
        program.watch({*label, *cached}, batch, see)
        seen.batches += 1
    if not seen.batches:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    for held in (seen.keys, seen.key_means):
        held.update({name: total / seen.batches for name, total in held.items()})
    return seen


def _by_head(vectors: Tensor) -> Tensor:
    """[.., H, T, D]; of [B H, T, D], heads folded into the batch, one head."""
    return vectors.unsqueeze(1) if vectors.ndim == 3 else vectors


def _ordinary(keys: Tensor) -> Tensor:
    """Keys [.., H, T, D] but for the first tokens, whose keys are unlike all others."""
    keys = _by_head(keys)
    return keys[..., _PIVOTS:, :] if keys.shape[-2] > 2 * _PIVOTS else keys


def _key_peak(keys: Tensor) -> Tensor:
    """Max |key| over positions, mean over sequences, which lets no single token decide: -> [H, D]."""
    return _ordinary(keys).abs().amax(-2).flatten(0, -3).mean(0).float()


def _key_mean(keys: Tensor) -> Tensor:
    """The mean key over positions and sequences: -> [H, D]."""
    return _ordinary(keys).float().mean(-2).flatten(0, -3).mean(0)
