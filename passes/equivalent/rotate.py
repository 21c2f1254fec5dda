"""Rotate: turn hidden bases by orthogonal matrices folded into the weights.

Source: QuaRot, arXiv:2404.00456 sec. 4; SpinQuant, arXiv:2405.16406 sec. 3 (R1, R2).
Law:    R R^T = 1.  R1, for a closed stream: readers W := W R, writers W := R^T W, b := R^T b, tables
        E := E R; norms of unit gain commute with R.  R2, for attention values: each head of the
        writer's rows W := R^T W, b := R^T b, the matching columns of the reader W := W R.
Keeps:  the output.   Needs: nothing.   Computed in float64, cast once.
        R is a randomised Hadamard matrix where its size has one, else a random orthogonal matrix;
        the choice is in the report.
Leaves: open streams (the obstacle is named), LayerNorms whose mean is not folded, tied weights,
        values that leave the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.residual_stream import ResidualStream
from qcompile.analysis.scale_folding import Consumers, Source, scale_source
from qcompile.analysis.sites import Site
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
    """Which bases are turned, and from which seed."""

    stream: bool = True  # R1: the residual stream
    heads: bool = True  # R2: the values of attention, one matrix for all heads of a site
    seed: int = 0


def rotate_columns(weight: Tensor, matrix: Tensor) -> Tensor:
    """W [.., n] -> W R for each block of columns, R [b, b] with b dividing n; float64, cast back."""
    rotated, matrix = torch.empty_like(weight), matrix.to(weight.device)
    for rows, out in zip(weight.split(4096), rotated.split(4096), strict=True):  # a whole table in float64 is large
        out.copy_((rows.double().unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2))
    return rotated


def rotate_rows(weight: Tensor, matrix: Tensor) -> Tensor:
    """W [n, K] or b [n] -> R^T W for each block of rows."""
    wide = weight.double()
    blocks = wide.unflatten(0, (-1, matrix.shape[0]))
    return torch.einsum("rs,br...->bs...", matrix.to(blocks.device), blocks).flatten(0, 1).to(weight.dtype)


def conflicts(config: Rotate, passes: Sequence[PassConfig]) -> list[str]:
    """Passes that cannot stand in one recipe with a rotation of streams, as text."""
    faults = []
    for other in passes if config.stream else ():
        name = type(other).__name__
        if isinstance(other, SmoothQuantPlus):
            faults.append(f"{name} puts scales into the norm gains that Rotate(stream=True) needs to be one: drop one")
        elif isinstance(other, (AWQ, SmoothQuant)) and other.norms:
            faults.append(
                f"{name}(norms=True) puts scales into the norm gains that Rotate(stream=True) needs to be one: "
                f"use {name}(norms=False) or Rotate(stream=False)"
            )
    return faults


def needs_folded_norms(config: Rotate) -> tuple[type[PassConfig], ...]:
    """What a rotation requires before it, whatever chooses its matrices."""
    return (FoldNorm,) if config.stream else ()


@rewrites(Rotate, Stage.ROTATE, exact=True, requires=needs_folded_norms, conflicts=conflicts)
def rotate(program: Program, config: Rotate, context: PassContext) -> PassReport:
    """Rotate every closed stream and every head basis, in place."""
    report = PassReport("Rotate")
    for index, (label, flow) in enumerate(streams_to_rotate(program, context, report) if config.stream else []):
        matrix, kind = random_rotation(flow.size, config.seed + index)
        rotate_stream(program, flow, matrix, label, report)
        report.notes.append(f"R1 of {flow.size} channels: {kind}, {len(flow.consumers)} readers")
    if config.heads:
        _rotate_heads(program, config.seed + 1000, context, report)
    return report


def streams_to_rotate(program: Program, context: PassContext, report: PassReport) -> list[tuple[str, ResidualStream]]:
    """The streams that can take another basis, with what a report calls them; the others are skipped in it."""
    found = []
    products = {site.node for site in context.facts.sites}
    for flow in context.facts.streams:
        label, problem = (
            f"stream of {flow.size} at {flow.norms[0].input.name}",
            stream_obstacle(program, flow, products),
        )
        if problem is None:
            found.append((label, flow))
        else:
            report.skip(label, problem.reason, problem.node)
    return found


def rotate_stream(program: Program, flow: ResidualStream, matrix: Tensor, label: str, report: PassReport) -> None:
    """Give a closed stream another orthogonal basis [n, n]: its writers, tables and readers."""
    for site in flow.consumers:
        program.weights[site.name] = rotate_columns(program.weights[site.name], matrix)
    for site in flow.producers:
        _change_rows(program, site, lambda w: rotate_rows(w, matrix))
    for table in flow.tables:
        name = program.weight_name(table)
        assert name is not None
        program.weights[name] = rotate_columns(program.weights[name], matrix)
    report.done.append(label)
    report.changed |= {value.name for value in flow.values}
    report.changed |= {node.name for norm in flow.norms for node in norm.inner}


def stream_obstacle(program: Program, flow: ResidualStream, products: set[fx.Node]) -> Obstacle | None:
    """Why a stream cannot take another basis, or None."""
    if flow.obstacles:
        return flow.obstacles[0]
    if not flow.closed:
        return Obstacle(flow.norms[0].input.name, "nobody writes or reads this stream")
    for norm in flow.norms:
        if norm.kind == "layer":
            return Obstacle(norm.output.name, "a LayerNorm subtracts a mean that is not folded")
    for site in (*flow.consumers, *flow.producers):
        if site.shared_with:
            return Obstacle(site.node.name, f"{site.name} is shared with {site.shared_with[0]}: untie it")
    for table in flow.tables:
        if any(user in products for user in table.users):
            return Obstacle(table.name, f"{program.weight_name(table)} is also a linear's weight: untie it")
    return None


def _rotate_heads(program: Program, seed: int, context: PassContext, report: PassReport) -> None:
    for consumers, source in head_bases(program, context, report):
        matrix, kind = random_rotation(source.head, seed)
        rotate_heads(program, consumers, source, matrix, report)
        note = f"R2 of {source.head} channels: {kind}"
        if note not in report.notes:
            report.notes.append(note)


def head_bases(program: Program, context: PassContext, report: PassReport) -> list[tuple[Consumers, Source]]:
    """The sites that read whole heads of an attention, and where these are made; the others are skipped."""
    found = []
    norms, sites = context.facts.norms, context.facts.sites
    for consumers in context.facts.consumers:
        if len(consumers.sites) != 1 or consumers.sites[0].shared_with:
            continue
        source = scale_source(program, consumers, norms, sites)
        if isinstance(source, Obstacle) or not source.attention or source.site is None:
            continue
        if source.pure and _whole_heads(source):
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
    report.changed |= {source.site.node.name} | {node.name for node in source.path}


def _whole_heads(source: Source) -> bool:
    """Every head of the reader is one aligned run of the writer's rows, all runs the same grid."""
    if not source.head or source.channels.numel() % source.head:
        return False
    heads = source.channels.reshape(-1, source.head)
    runs = bool((heads == heads[:, :1] + torch.arange(source.head)).all())
    rows = source.channels.unique()
    starts = rows.reshape(-1, source.head)[:, 0] if rows.numel() % source.head == 0 else None
    return runs and starts is not None and set(heads[:, 0].tolist()) == set(starts.tolist())


def _change_rows(program: Program, site: Site, change: Callable[[Tensor], Tensor]) -> None:
    """Apply `change` to a site's weight rows and to its bias."""
    for name in filter(None, (site.name, program.weight_name(site.bias))):
        program.weights[name] = change(program.weights[name])
