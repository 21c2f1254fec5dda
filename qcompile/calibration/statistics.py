"""Statistics streamed through a program, node by node; activations are never kept.

One batch at a time runs through the graph; values are freed after their last use, and a statistic
is updated as its node is computed. What stays is one vector for each observed value. Padding counts in none.
Where weights lie in files, all batches run layer by layer instead, and each weight is read once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx

from qcompile.analysis.facts import Facts
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.padding import BatchTokens, TokenMask
from qcompile.calibration.padding import CalibrationError as CalibrationError
from qcompile.calibration.ranks import Ranks
from qcompile.ir.program import Program
from qcompile.memory.spilled_weights import SpillFolder
from qcompile.memory.stored_tensor import StoredTensor, loaded

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
    ranks: Ranks = Ranks(),  # noqa: B008  it is frozen
    offload: SpillFolder | None = None,
) -> Statistics:
    """Stream batches through a program and gather the absmax of site inputs, and statistics of keys and values.

    Args:
        program: what runs.
        batches: flat inputs of the program, one sequence for each batch.
        sites: whether to observe the inputs of sites.
        attentions: whether to observe keys and values.
        facts: of the program, if they are known.
        progress: show a bar.
        ranks: the processes that share the batches; each has some of them.
        offload: where values of batches go that are not being computed with, where all batches run together.

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
    # A value is recorded when it is read first: memory that was only allocated is filled by then.
    first_reader = {flow.values: flow.value_product for flow in flows} | {flow.keys: flow.node for flow in flows}
    first_reader |= {g.root: g.sites[0].node for g in groups if g.sites and g.root not in first_reader}

    def check(node: fx.Node, absmax: Tensor, where: str, batch: int) -> None:
        if not bool(torch.isfinite(absmax).all()):
            raise CalibrationError(
                f"batch {batch} brings NaN or Inf to {where} (node {node.name}). "
                "Fix: drop that batch, or calibrate in float32"
            )

    def record(node: fx.Node, value: Tensor, tokens: BatchTokens, batch: int) -> None:
        if node in cached:
            sequences = _sequences(node, value.detach(), tokens, cached[node])
            peaks = [vectors.abs().amax(-2).flatten(0, -3).amax(0) for vectors in sequences]
            absmax = torch.stack(peaks).amax(0).float().cpu()
            check(node, absmax, places[node], batch)
            _raise_to(statistics.cached, node.name, absmax)
            if node in transposed:
                _add_to(statistics.keys, node.name, _key_absmax, sequences)
                _add_to(statistics.key_means, node.name, _key_mean, sequences)
        if node in labels:
            rows = tokens.rows(node, value.detach())
            absmax = (rows.abs().amax(0) if len(rows) else rows.new_zeros(rows.shape[-1])).float().cpu()
            check(node, absmax, labels[node], batch)
            _raise_to(statistics.absmax, node.name, absmax)

    watched = {node: first_reader.get(node, node) for node in dict.fromkeys([*labels, *cached])}
    stored = any(isinstance(weight, StoredTensor) for weight in program.weights.values())
    run = functools.partial(_by_layer, offload=offload) if stored else _by_batch
    statistics.batches, statistics.notes = run(program, batches, watched, record, progress)
    if not statistics.batches:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    for peaks in (statistics.absmax, statistics.cached):
        for name in sorted(peaks):
            ranks.raise_to_largest(peaks[name])
    count = torch.tensor(statistics.batches)
    ranks.add(count)
    statistics.batches = int(count)
    for sums in (statistics.keys, statistics.key_means):
        for name in sorted(sums):
            ranks.add(sums[name])
        sums.update({name: (total / statistics.batches).float() for name, total in sums.items()})
    return statistics


Record = Callable[[fx.Node, Tensor, BatchTokens, int], None]
"""record(node, value, tokens, number of the batch, from 1)."""


def _by_batch(
    program: Program, batches: Iterable[Sequence[Any]], watched: dict[fx.Node, fx.Node], record: Record, progress: bool
) -> tuple[int, list[str]]:
    """Run batch after batch through the whole program; returns how many, and notes on padding.

    Args:
        program: what runs.
        batches: flat inputs of the program.
        watched: a node -> the node at which its value is recorded.
        record: called with each value.
        progress: show a bar.
    """
    mask, count = TokenMask(program), 0
    unread: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, value: Any, tokens: BatchTokens) -> None:
        if node in watched:
            unread[node] = value
        for ready in [n for n in unread if watched[n] is node]:
            record(ready, unread.pop(ready), tokens, count)

    for batch in track(batches, "calibrating", disable=not progress, transient=True):
        count += 1
        mask.of(batch, count).watch({*watched, *watched.values()}, batch, see)
    return count, mask.notes()


def _by_layer(
    program: Program,
    batches: Iterable[Sequence[Any]],
    watched: dict[fx.Node, fx.Node],
    record: Record,
    progress: bool,
    offload: SpillFolder | None,
) -> tuple[int, list[str]]:
    """As `_by_batch`, with all batches together, so that a weight that lies in a file is read once."""
    run = LayerwiseRun(program, batches, observed=watched, offload=offload)
    run.kept.update(watched)  # the reader of one may read a view of it
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    stops = sorted(watched, key=lambda node: place[watched[node]])
    for node in track(stops, "calibrating", disable=not progress, transient=True):
        run.advance(watched[node] if watched[node] is not node else node.next)
        for number, (value, tokens) in enumerate(zip(run.values_of(node), run.tokens, strict=True), 1):
            record(node, loaded(value), tokens, number)
        run.release(node)
    return len(run.values), run.notes()


def _raise_to(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = torch.maximum(found.get(name, value), value)


def _add_to(sums: dict[str, Tensor], name: str, of: Callable[[Tensor], Tensor], sequences: list[Tensor]) -> None:
    """Add the mean over sequences to a sum over batches."""
    value = torch.stack([of(vectors) for vectors in sequences]).mean(0).cpu().double()  # sums in any order agree
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
