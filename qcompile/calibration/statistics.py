"""Statistics streamed through a program, node by node; activations are never kept.

One batch at a time runs through the graph; values are freed after their last use, and a statistic
is updated as its node is computed. What stays is one vector for each observed value. Padding counts in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx

from qcompile.analysis.facts import Facts
from qcompile.calibration.padding import BatchTokens, TokenMask
from qcompile.calibration.padding import CalibrationError as CalibrationError
from qcompile.ir.program import Program

_SINK_TOKENS = 4  # first tokens of a sequence, which carry massive activations


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
        notes: what a report must say of padding (see padding.py).
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Tensor] = field(default_factory=dict)
    key_means: dict[str, Tensor] = field(default_factory=dict)
    cached: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    notes: list[str] = field(default_factory=list)


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
        CalibrationError: no batch at all, a batch without a token, or NaN or Inf in a token's input of a site, key or
            value.
    """
    statistics = Statistics()
    facts = facts or Facts(program)
    groups = facts.consumers if sites else []
    flows = facts.attentions if attentions else []
    labels = {g.root: (g.sites[0].name if g.sites else g.root.name) for g in groups}
    transposed = {flow.keys: flow.keys_transposed for flow in flows}
    cached = {flow.values: False for flow in flows} | transposed
    places = {flow.values: f"the values of {flow.value_product.name}" for flow in flows}
    places |= {flow.keys: f"the keys of {flow.node.name}" for flow in flows}
    mask = TokenMask(program)
    # A value is recorded when it is read first: memory that was only allocated is filled by then.
    first_reader = {flow.values: flow.value_product for flow in flows} | {flow.keys: flow.node for flow in flows}
    first_reader |= {g.root: g.sites[0].node for g in groups if g.sites and g.root not in first_reader}
    unread: dict[fx.Node, Tensor] = {}

    def check(node: fx.Node, absmax: Tensor, where: str) -> None:
        if not bool(torch.isfinite(absmax).all()):
            raise CalibrationError(
                f"batch {statistics.batches + 1} brings NaN or Inf to {where} (node {node.name}). "
                "Fix: drop that batch, or calibrate in float32"
            )

    def record(node: fx.Node, value: Tensor, tokens: BatchTokens) -> None:
        if node in cached:
            sequences = _sequences(node, value.detach(), tokens, cached[node])
            peaks = [vectors.abs().amax(-2).flatten(0, -3).amax(0) for vectors in sequences]
            absmax = torch.stack(peaks).amax(0).float().cpu()
            check(node, absmax, places[node])
            _raise_to(statistics.cached, node.name, absmax)
            if node in transposed:
                _add_to(statistics.keys, node.name, _key_absmax, sequences)
                _add_to(statistics.key_means, node.name, _key_mean, sequences)
        if node in labels:
            rows = tokens.rows(node, value.detach())
            absmax = (rows.abs().amax(0) if len(rows) else rows.new_zeros(rows.shape[-1])).float().cpu()
            check(node, absmax, labels[node])
            _raise_to(statistics.absmax, node.name, absmax)

    def see(node: fx.Node, value: Any, tokens: BatchTokens) -> None:
        if node in labels or node in cached:
            unread[node] = value
        for ready in [n for n in unread if first_reader.get(n, n) is node]:
            record(ready, unread.pop(ready), tokens)

    for batch in track(batches, "calibrating", disable=not progress, transient=True):
        tokens = mask.of(batch, statistics.batches + 1)
        tokens.watch({*labels, *cached, *first_reader.values()}, batch, see)
        statistics.batches += 1
    if not statistics.batches:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    for sums in (statistics.keys, statistics.key_means):
        sums.update({name: total / statistics.batches for name, total in sums.items()})
    statistics.notes = mask.notes()
    return statistics


def _raise_to(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = torch.maximum(found.get(name, value), value)


def _add_to(sums: dict[str, Tensor], name: str, of: Callable[[Tensor], Tensor], sequences: list[Tensor]) -> None:
    """Add the mean over sequences to a sum over batches."""
    value = torch.stack([of(vectors) for vectors in sequences]).mean(0).cpu()
    sums[name] = sums[name] + value if name in sums else value


def _sequences(node: fx.Node, value: Tensor, tokens: BatchTokens, transposed: bool) -> list[Tensor]:
    """Keys or values of an attention as [.., H, T, D]: all sequences at once, or each without its padding."""
    kept = tokens.along(node, value, -2 if transposed else -1)
    vectors = _by_head(value.transpose(-1, -2) if transposed else value)
    if kept is None:
        return [vectors]
    kept = (kept.unsqueeze(1) if kept.ndim == 2 else kept).flatten(0, -3)[:, 0]  # [sequences, T], of the first head
    pairs = zip(vectors.flatten(0, -4), kept, strict=True)
    return [sequence[:, own][None] for sequence, own in pairs if bool(own.any())]


def _by_head(vectors: Tensor) -> Tensor:
    """[.., H, T, D]; of [B H, T, D], heads folded into the batch, one head."""
    return vectors.unsqueeze(1) if vectors.ndim == 3 else vectors


def _without_sinks(keys: Tensor) -> Tensor:
    """Keys [.., H, T, D] but for the first tokens, whose keys are unlike all others."""
    return keys[..., _SINK_TOKENS:, :] if keys.shape[-2] > 2 * _SINK_TOKENS else keys


def _key_absmax(keys: Tensor) -> Tensor:
    """Max |key| over positions, mean over sequences, which lets no single token decide: -> [H, D]."""
    return _without_sinks(keys).abs().amax(-2).flatten(0, -3).mean(0).float()


def _key_mean(keys: Tensor) -> Tensor:
    """The mean key over positions and sequences: -> [H, D]."""
    return _without_sinks(keys).float().mean(-2).flatten(0, -3).mean(0)
