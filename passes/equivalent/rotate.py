"""Rotate: hidden bases rotated by orthogonal matrices that fold into the weights.

Source: QuaRot, arXiv:2404.00456 sec. 4; SpinQuant, arXiv:2405.16406 sec. 3 (R1, R2).
Law:    R R^T = 1.  R1, for a closed stream: consumers W := W R, producers W := R^T W, b := R^T b, tables
        E := E R; norms of unit gain commute with R.  R2, for attention values: each head of the
        producer's rows W := R^T W, b := R^T b, the matching columns of the consumer W := W R.
        R is a randomized Hadamard matrix where its size has one, else a random orthogonal matrix;
        the choice is in the report.
Keeps:  the output; computed in float64, cast once.
Needs:  nothing.
Skips:  open streams (the obstacle is named), LayerNorms whose mean is not folded, tied weights,
        values that leave the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.residual_stream import ResidualStream
from qcompile.analysis.scale_folding import Consumers, Source, scale_source
from qcompile.analysis.sites import Site
from qcompile.analysis.tied_weights import tied_obstacle, tied_table_obstacle
from qcompile.ir.program import Program
from qcompile.numerics.hadamard import random_rotation
from qcompile.passes.equivalent.awq import AWQ
from qcompile.passes.equivalent.fold_norm import FoldNorm
from qcompile.passes.equivalent.smoothquant import SmoothQuant
from qcompile.passes.equivalent.smoothquant_plus import SmoothQuantPlus
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class Rotate(PassConfig):
    """Which bases are rotated, and from which seed."""

    # The papers' R1: rotate residual streams. Their norms must be folded before (FoldNorm).
    stream: bool = True
    # The papers' R2: rotate the values of attention, by one matrix for all heads of a site.
    heads: bool = True
    # Of the random signs and matrices.
    seed: int = 0


def rotate_columns(weight: Tensor, matrix: Tensor) -> Tensor:
    """W [.., n] -> W R for each block of columns, R [b, b] with b dividing n; float64, cast back."""
    if weight.ndim == 1:
        return rotate_columns(weight[None], matrix)[0]
    rotated, matrix = torch.empty_like(weight), matrix.to(weight.device)
    for rows, out in zip(weight.split(4096), rotated.split(4096), strict=True):  # a whole table in float64 is large
        out.copy_((rows.double().unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2))
    return rotated


def rotate_rows(weight: Tensor, matrix: Tensor) -> Tensor:
    """W [n, K] or b [n] -> R^T W for each block of rows; float64, cast back."""
    wide = weight.double()
    blocks = wide.unflatten(0, (-1, matrix.shape[0]))
    return torch.einsum("rs,br...->bs...", matrix.to(blocks.device), blocks).flatten(0, 1).to(weight.dtype)


def conflicts(config: Rotate, passes: Sequence[PassConfig]) -> list[str]:
    """Passes that cannot stand in one recipe with a rotation of streams, as text."""
    faults = []
    for other in passes if config.stream else ():
        name = type(other).__name__
        if isinstance(other, SmoothQuantPlus):
            faults.append(
                f"{name} puts scales into the norm gains that Rotate(stream=True) needs to be one. Fix: drop one"
            )
        elif isinstance(other, (AWQ, SmoothQuant)) and other.norms:
            faults.append(
                f"{name}(norms=True) puts scales into the norm gains that Rotate(stream=True) needs to be one. "
                f"Fix: {name}(norms=False) or Rotate(stream=False)"
            )
    return faults


def needs_folded_norms(config: Rotate) -> tuple[type[PassConfig], ...]:
    """Passes that must come before a rotation, whatever chooses its matrices."""
    return (FoldNorm,) if config.stream else ()


@rewrites(Rotate, Stage.ROTATE, exact=True, requires=needs_folded_norms, conflicts=conflicts)
def rotate(program: Program, config: Rotate, context: PassContext) -> PassReport:
    """Rotate every closed stream and every head basis, in place."""
    report = PassReport("Rotate")
    for index, (label, stream) in enumerate(streams_to_rotate(program, context, report) if config.stream else []):
        matrix, kind = random_rotation(stream.size, config.seed + index)
        rotate_stream(program, stream, matrix, label, report)
        report.notes.append(f"R1 of {stream.size} channels: {kind}, {len(stream.consumers)} consumers")
    if config.heads:
        _rotate_heads(program, config.seed + 1000, context, report)
    return report


def streams_to_rotate(program: Program, context: PassContext, report: PassReport) -> list[tuple[str, ResidualStream]]:
    """The streams that can take another basis, each with its label in the report, where the others are skipped."""
    found = []
    sites = context.facts.sites
    for stream in context.facts.streams:
        label = stream.label
        obstacle = stream_obstacle(program, stream, sites)
        if obstacle is None:
            found.append((label, stream))
        else:
            report.skip(label, obstacle.reason, obstacle.node)
    return found


def rotate_stream(program: Program, stream: ResidualStream, matrix: Tensor, label: str, report: PassReport) -> None:
    """Give a closed stream another orthogonal basis [n, n]: its producers, tables and consumers."""
    for site in stream.consumers:
        program.weights[site.name] = rotate_columns(program.weights[site.name], matrix)
    for site in stream.producers:
        _change_rows(program, site, lambda w: rotate_rows(w, matrix))
    for table in stream.tables:
        name = program.weight_name(table)
        assert name is not None
        program.weights[name] = rotate_columns(program.weights[name], matrix)
    report.done.append(label)
    report.changed |= {value.name for value in stream.values}
    report.changed |= {node.name for norm in stream.norms for node in norm.inner}


def stream_obstacle(program: Program, stream: ResidualStream, sites: list[Site]) -> Obstacle | None:
    """Why a stream cannot take another basis, or None."""
    if stream.obstacle is not None:
        return stream.obstacle
    for norm in stream.norms:
        if norm.kind == "layer":
            return Obstacle(norm.output.name, "a LayerNorm subtracts a mean that is not folded")
    tied = tied_obstacle((*stream.consumers, *stream.producers))
    return tied or tied_table_obstacle(program, stream.tables, sites)


def _rotate_heads(program: Program, seed: int, context: PassContext, report: PassReport) -> None:
    for consumers, source in head_bases(program, context, report):
        matrix, kind = random_rotation(source.head, seed)
        rotate_heads(program, consumers, source, matrix, report)
        note = f"R2 of {source.head} channels: {kind}"
        if note not in report.notes:
            report.notes.append(note)


def head_bases(program: Program, context: PassContext, report: PassReport) -> list[tuple[Consumers, Source]]:
    """The sites that read whole heads of an attention, and where these come from; the others are skipped."""
    found = []
    norms, sites = context.facts.norms, context.facts.sites
    for consumers in context.facts.consumers:
        if len(consumers.sites) != 1 or consumers.sites[0].shared_with:
            continue
        source = scale_source(program, consumers, norms, sites)
        if isinstance(source, Obstacle) or not source.attention or source.site is None:
            continue
        if source.pure and source.head:
            found.append((consumers, source))
        else:
            report.skip(
                consumers.sites[0].name, "its heads are not whole blocks of the value's rows", consumers.root.name
            )
    return found


def rotate_heads(program: Program, consumers: Consumers, source: Source, matrix: Tensor, report: PassReport) -> None:
    """Give the heads of an attention's values another orthogonal basis [D, D]."""
    consumer = consumers.sites[0]
    program.weights[consumer.name] = rotate_columns(program.weights[consumer.name], matrix)
    rows = source.channels.unique()

    def rotate_some(weight: Tensor) -> Tensor:
        rotated = weight.clone()
        rotated[rows] = rotate_rows(weight[rows], matrix)
        return rotated

    assert source.site is not None
    _change_rows(program, source.site, rotate_some)
    report.done.append(f"heads of {source.head} in {consumer.name}")
    report.changed |= {source.site.node.name} | {node.name for node in (*source.path, *consumers.values)}


def _change_rows(program: Program, site: Site, change: Callable[[Tensor], Tensor]) -> None:
    """Apply `change` to a site's weight rows and to its bias."""
    for name in filter(None, (site.name, program.weight_name(site.bias))):
        program.weights[name] = change(program.weights[name])
