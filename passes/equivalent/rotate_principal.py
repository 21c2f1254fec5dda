"""RotatePrincipal: hidden bases rotated to their principal axes, where formats with an exponent round best.

Source: ours; the folding is Rotate's (QuaRot, arXiv:2404.00456), principal axes of a stream as in
        SliceGPT (arXiv:2401.15024 sec. 3.3), there to delete channels.
Law:    the output stays for every orthogonal R, as in Rotate. Which R: a float format rounds every
        value by a share eps of itself, so a product carries noise
            E |sum_k w_k x_k e_k|^2 = eps^2 sum_k w_k^2 E x_k^2.
        On the eigenvectors of E x x^T channels are uncorrelated, and that is eps^2 E (w x)^2: eps of
        the signal for every row w. On other axes it is more wherever rows cancel what many channels
        have in common, as the massive activations of a stream: a Hadamard matrix, right for integers,
        spreads these over all channels, and the noise with them.
Keeps:  the output; computed in float64, cast once.
Needs:  whole batches.
Skips:  what Rotate skips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.calibration.padding import BatchTokens, CalibrationError, TokenMask
from qcompile.ir.program import Program
from qcompile.passes.equivalent.rotate import (
    Rotate,
    conflicts,
    head_bases,
    needs_folded_norms,
    rotate_heads,
    rotate_stream,
    streams_to_rotate,
)
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class RotatePrincipal(Rotate):
    """Rotate to the principal axes of the calibration data: nothing is random, and `seed` is not used."""


def principal_axes(moment: Tensor) -> Tensor:
    """Eigenvectors of a second moment [n, n], largest first, as columns: x R is uncorrelated; float64."""
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors.flip(1).contiguous()


@rewrites(
    RotatePrincipal, Stage.ROTATE, exact=True, needs=("batches",), requires=needs_folded_norms, conflicts=conflicts
)
def rotate_principal(program: Program, config: RotatePrincipal, context: PassContext) -> PassReport:
    """Rotate every closed stream and every head basis to its principal axes, in place."""
    report = PassReport("RotatePrincipal")
    streams = streams_to_rotate(program, context, report) if config.stream else []
    heads = head_bases(program, context, report) if config.heads else []

    # One basis serves all consumers of a stream: behind their norms each of them weighs the same.
    watched: dict[fx.Node, tuple[str, int]] = {}
    groups = context.facts.consumers
    for label, stream in streams:
        names = {site.name for site in stream.consumers}
        for group in groups:
            if any(site.name in names for site in group.sites):
                watched[group.root] = (label, stream.size)
    for group, source in heads:
        watched[group.root] = (group.sites[0].name, source.head)
    mask = TokenMask(program)
    moments = _second_moments(mask, context, watched)
    report.notes += mask.notes()
    axes = {label: principal_axes(moment) for label, moment in moments.items()}

    for label, stream in streams:
        if label not in axes:
            report.skip(label, "no linear reads it")
            continue
        rotate_stream(program, stream, axes[label], label, report)
        first, whole = axes[label][:, 0], moments[label].trace().clamp_min(1e-300)
        report.notes.append(f"{label}: {float(first @ moments[label] @ first / whole):.0%} of its energy on one axis")
    for group, source in heads:
        rotate_heads(program, group, source, axes[group.sites[0].name], report)
    return report


def _second_moments(
    mask: TokenMask, context: PassContext, watched: dict[fx.Node, tuple[str, int]]
) -> dict[str, Tensor]:
    """Sum of x^T x of each label over tokens of its nodes, whose last dimension holds blocks of `size` channels.

    A batch's products are of the values' own precision, float32 at least; their sum is float64.
    """
    moments = {label: torch.zeros(size, size, dtype=torch.float64) for label, size in watched.values()}

    def see(node: fx.Node, value: Any, tokens: BatchTokens) -> None:
        label, size = watched[node]
        x = tokens.rows(node, value.detach()).reshape(-1, size)
        x = x if x.dtype == torch.float64 else x.float()
        moment = (x.t() @ x).double().cpu()
        if not bool(torch.isfinite(moment).all()):
            raise CalibrationError(
                f"RotatePrincipal: batch {count + 1} brings NaN or Inf to {label} (node {node.name}). Fix: drop it"
            )
        moments[label] += moment

    count = 0
    for batch in context.track(context.data() if watched else [], "RotatePrincipal"):
        mask.of(batch, count + 1).watch(watched, batch, see)
        count += 1
    if watched and not count:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    return moments
