"""ReorderChannels: input channels sorted by the size of their activations, so that a group holds its like.

Source: QServe, arXiv:2405.04532 sec. 4.3.3 (activation-aware channel reordering); Rotated Runtime Smooth,
        arXiv:2409.20361 sec. 3.2 (the order that its groups need), made static by calibration.
Law:    x W^T = (x P)(W P)^T for a permutation P. It folds into the rows that give x: through an
        elementwise function of several linears (a gate) into all of them; through attention within
        each head, the same for heads that share their values; for a residual stream into all its
        producers and consumers, like a rotation.
Keeps:  the output.
Needs:  absmax of the input, [K].
Skips:  inputs that linear rows do not give alone, or whose rows feed channels in no common order; tied weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.analysis.channel_origin import ChannelOrigins, FlowStops, one_position
from qcompile.analysis.scale_folding import Consumers
from qcompile.analysis.sites import Site
from qcompile.analysis.tied_weights import tied_obstacle
from qcompile.ir.program import Program
from qcompile.passes.equivalent.fold_norm import FoldNorm
from qcompile.passes.equivalent.rotate import rotate_stream, streams_to_rotate
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class ReorderChannels(PassConfig):
    """What to reorder."""

    # Reorder residual streams; norms must be folded. A rotation of the stream leaves nothing to sort.
    stream: bool = False
    # Reorder the inputs that rows of linears give: behind a gate, behind an attention.
    rows: bool = True


@rewrites(
    ReorderChannels,
    Stage.ONLINE,
    exact=True,
    needs=("absmax",),
    requires=lambda config: (FoldNorm,) if config.stream else (),
)
def reorder_channels(program: Program, config: ReorderChannels, context: PassContext) -> PassReport:
    """Sort every input whose order can be folded, in place."""
    report = PassReport("ReorderChannels")
    groups = context.facts.consumers
    if config.stream:
        _streams(program, groups, context, report)
    for consumers in groups if config.rows else []:
        if consumers.root not in context.facts.norm_outputs:
            _rows(program, consumers, context, report)
    return report


def _streams(program: Program, groups: list[Consumers], context: PassContext, report: PassReport) -> None:
    for label, stream in streams_to_rotate(program, context, report):
        names = {site.name for site in stream.consumers}
        peaks = [context.statistics.absmax[g.root.name] for g in groups if any(s.name in names for s in g.sites)]
        order = torch.stack(peaks).amax(0).argsort(descending=True)
        rotate_stream(program, stream, torch.eye(stream.size, dtype=torch.float64)[:, order], label, report)


def _rows(program: Program, consumers: Consumers, context: PassContext, report: PassReport) -> None:
    label = consumers.sites[0].name
    if consumers.other_consumers:
        report.skip(label, "the input is read by something that is not a site too", consumers.other_consumers[0].name)
        return
    absmax = context.statistics.absmax[consumers.root.name]
    origins = ChannelOrigins(program, context.facts.sites, elementwise=True)
    try:
        terms = one_position(origins.terms(consumers.root))
        heads = origins.attention_heads()
        order = common_order(terms, absmax, heads[0].shape[-1] if heads else 0)
        origins.check_consumers(terms, {site.node for site in consumers.sites} | set(consumers.values))
    except FlowStops as stop:
        report.skip(label, str(stop.args[1]), str(stop.args[0]))
        return
    tied = tied_obstacle([*consumers.sites, *(producer for producer, _ in origins.producers)])
    if tied is not None:
        report.skip(label, tied.reason, tied.node)
        return
    source = torch.arange(origins.rows)  # for each row, the row that takes its place
    for term in terms:
        source[term] = term[order]
    if any(bool((source[rows].sort(-1).values != rows.sort(-1).values).any()) for rows in heads):
        report.skip(label, "the order would take rows from one head of an attention to another", consumers.root.name)
        return
    for producer, start in origins.producers:
        _permute(program, producer, source[start : start + producer.N] - start)
    for site in consumers.sites:
        program.weights[site.name] = program.weights[site.name][:, order].contiguous()
    report.done.append(label)
    report.changed |= {n.name for n, found in origins.memo.items() if found} | {n.name for n in consumers.values}


def common_order(terms: list[Tensor], absmax: Tensor, head: int) -> Tensor:
    """The order of channels [K] by falling absmax that all terms allow.

    Args:
        terms: [K] the row behind each channel, one tensor for each linear that the value comes from.
        absmax: [K] of each channel.
        head: channels of a head, which no channel leaves; 0: no heads.

    Raises:
        FlowStops: rows feed channels in no common order.
    """
    width = head or len(absmax)
    blocks = [term.reshape(-1, width) for term in terms]
    offsets = [b - b[:, :1] for b in blocks]
    for block, offset in zip(blocks, offsets, strict=True):
        if not bool((offset == offset[0]).all()) or len(offset[0].unique()) != width or int(block.min()) < 0:
            raise FlowStops("value", "its rows feed channels in no common order")
    # Heads that share rows in any term must share their order: with grouped values, one set of rows.
    owner = blocks[0][:, 0]
    peaks = absmax.reshape(-1, width)
    order = torch.empty_like(blocks[0])
    for rows in owner.unique():
        sharing = owner == rows
        order[sharing] = peaks[sharing].amax(0).argsort(descending=True)
    for block in blocks[1:]:
        for rows in block[:, 0].unique():
            if len(order[block[:, 0] == rows].unique(dim=0)) != 1:
                raise FlowStops("value", "its rows feed channels in no common order")
    return (order + torch.arange(len(order))[:, None] * width).flatten()


def _permute(program: Program, producer: Site, source: Tensor) -> None:
    """Row i of a site's weight and bias becomes what row source[i] was."""
    for name in [producer.name, program.weight_name(producer.bias)]:
        if name is not None:
            program.weights[name] = program.weights[name][source].contiguous()
