"""Statistics streamed through a program, node by node; activations are never kept.

One batch at a time runs through the graph; values are freed after their last use, and a statistic
is updated as its node is computed. What stays is one vector for each observed value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx

from qcompile.analysis.facts import Facts
from qcompile.ir.program import Program

_SINK_TOKENS = 4  # first tokens of a sequence, which carry massive activations


class CalibrationError(ValueError):
    """Calibration data that cannot be used; the text names the batch or the site and the fix."""


@dataclass
class Statistics:
    """What calibration observed, by the name of the graph node; on the CPU, wherever the model is.

    Attributes:
        absmax: of a site's input: max |x| for each channel, [K] float32.
        keys: of an attention's keys: max |key| of a sequence for each head and channel, the mean over sequences,
            [H, D] float32.
        key_means: the mean key of an attention, [H, D] float32.
        cached: of keys and of values: max over all tokens for each head and channel, [H, D] float32.
        batches: how many batches were observed.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    key_means: dict[str, Tensor] = field(default_factory=dict)
    cached: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0


def observe(
    program: Program,
    batches: Iterable[Sequence[Any]],
    *,
    sites: bool = True,
    attentions: bool = True,
    facts: Facts | None = None,
    progress: bool = False,
) -> Statistics:
    """Stream batches through a program and gather the absmax of site inputs, and statistics of keys and values.

    Args:
        program: what runs.
        batches: flat inputs of the program, one sequence for each batch.
        sites: whether to observe the inputs of sites.
        attentions: whether to observe keys and values.
        facts: of the program, if they are known.
        progress: show a bar.

    Raises:
        CalibrationError: no batch at all, or NaN or Inf in the input of a site, a key or a value.
    """
    statistics = Statistics()
    facts = facts or Facts(program)
    groups = facts.consumers if sites else []
    flows = facts.attentions if attentions else []
    labels = {g.root: (g.sites[0].name if g.sites else g.root.name) for g in groups}
    transposed = {flow.keys: flow.keys_transposed for flow in flows}
    cached = {flow.values: False for flow in flows} | transposed

    def check(node: fx.Node, absmax: Tensor, where: str) -> None:
        if not bool(torch.isfinite(absmax).all()):
            raise CalibrationError(
                f"batch {statistics.batches + 1} brings NaN or Inf to {where} (node {node.name}). "
                "Fix: drop that batch, or calibrate in float32"
            )

    def record(node: fx.Node, value: Tensor) -> None:
        if node in cached:
            vectors = value.detach().transpose(-1, -2) if cached[node] else value.detach()
            absmax = _by_head(vectors).abs().amax(-2).flatten(0, -3).amax(0).float().cpu()
            check(node, absmax, "an attention")
            _raise_to(statistics.cached, node.name, absmax)
            if node in transposed:
                _add_to(statistics.keys, node.name, _key_absmax, vectors)
                _add_to(statistics.key_means, node.name, _key_mean, vectors)
        if node in labels:
            absmax = value.detach().abs().flatten(0, -2).amax(0).float().cpu()
            check(node, absmax, labels[node])
            _raise_to(statistics.absmax, node.name, absmax)

    for batch in track(batches, "calibrating", disable=not progress, transient=True):
        program.watch({*labels, *cached}, batch, record)
        statistics.batches += 1
    if not statistics.batches:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    for sums in (statistics.keys, statistics.key_means):
        sums.update({name: total / statistics.batches for name, total in sums.items()})
    return statistics


def _raise_to(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = torch.maximum(found.get(name, value), value)


def _add_to(sums: dict[str, Tensor], name: str, of: Callable[[Tensor], Tensor], vectors: Tensor) -> None:
    value = of(vectors).cpu()
    sums[name] = sums[name] + value if name in sums else value


def _by_head(vectors: Tensor) -> Tensor:
    """[.., H, T, D]; of [B H, T, D], heads folded into the batch, one head."""
    return vectors.unsqueeze(1) if vectors.ndim == 3 else vectors


def _without_sinks(keys: Tensor) -> Tensor:
    """Keys [.., H, T, D] but for the first tokens, whose keys are unlike all others."""
    keys = _by_head(keys)
    return keys[..., _SINK_TOKENS:, :] if keys.shape[-2] > 2 * _SINK_TOKENS else keys


def _key_absmax(keys: Tensor) -> Tensor:
    """Max |key| over positions, mean over sequences, which lets no single token decide: -> [H, D]."""
    return _without_sinks(keys).abs().amax(-2).flatten(0, -3).mean(0).float()


def _key_mean(keys: Tensor) -> Tensor:
    """The mean key over positions and sequences: -> [H, D]."""
    return _without_sinks(keys).float().mean(-2).flatten(0, -3).mean(0)
