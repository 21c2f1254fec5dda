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

from qcompile.attention_flow import products
from qcompile.program import Program
from qcompile.scale_flow import groups_of_readers
from qcompile.sites import find_sites


class CalibrationError(ValueError):
    """Calibration data that cannot be used; the text names the batch or the site and the mend."""


@dataclass
class Statistics:
    """What calibration saw, by the name of the graph node.

    Attributes:
        absmax: node name -> max |value| for each channel, [K] float32.
        keys: node name -> max |key| for each head and channel of an attention, [heads, D] float32.
        batches: how many batches were seen.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0


def observe(program: Program, batches: Iterable[Sequence[Any]], *, progress: bool = False) -> Statistics:
    """Stream batches through a program and gather the absmax of every site's input and of all keys.

    Args:
        program: the program. batches: flat inputs of the program, one sequence for each batch.
        progress: show a bar.

    Raises:
        CalibrationError: no batch at all, or NaN or Inf in the input of a site.
    """
    seen = Statistics()
    groups = groups_of_readers(find_sites(program))
    label = {g.root: (g.sites[0].name if g.sites else g.root.name) for g in groups}
    turned = {p.keys: p.turned for p in products(program)}

    def see(node: Any, value: Any) -> None:
        if node in turned:
            peak = value.detach().abs().amax(-1 if turned[node] else -2)  # [.., heads, D]
            peak = peak.flatten(0, -3).amax(0) if peak.ndim > 2 else peak[:, None] if peak.ndim == 1 else peak
            old = seen.keys.get(node.name)
            seen.keys[node.name] = peak.float() if old is None else torch.maximum(old, peak.float())
        if node not in label:
            return
        peak = value.detach().abs().flatten(0, -2).amax(0).float()
        if not bool(torch.isfinite(peak).all()):
            raise CalibrationError(
                f"batch {seen.batches + 1} brings NaN or Inf to {label[node]} (node {node.name}): "
                "drop that batch, or calibrate in float32"
            )
        old = seen.absmax.get(node.name)
        seen.absmax[node.name] = peak if old is None else torch.maximum(old, peak)

    for batch in track(batches, "calibrating", disable=not progress, transient=True):
        program.watch({*label, *turned}, batch, see)
        seen.batches += 1
    if not seen.batches:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    return seen
