"""RotatePrincipal: turn hidden bases to their principal axes, where formats with an exponent round best.

Source: ours; the folding is Rotate's (QuaRot, arXiv:2404.00456), principal axes of a stream as in
        SliceGPT (arXiv:2401.15024 sec. 3.3), there to delete channels.
Law:    the output stays for every orthogonal R, as in Rotate. Which R: a float format rounds every
        number by a share eps of itself, so a product carries noise
            E |sum_k w_k x_k e_k|^2 = eps^2 sum_k w_k^2 E x_k^2.
        On the eigenvectors of E x x^T channels are uncorrelated, and that is eps^2 E (w x)^2: eps of
        the signal for every row w. On other axes it is more wherever rows cancel what many channels
        have in common, as the massive activations of a stream: a Hadamard matrix, right for integers,
        spreads these over all channels, and the noise with them.
Needs:  whole batches.   Leaves: what Rotate leaves.   Computed in float64, cast once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx

from qcompile.calibrate import CalibrationError, Statistics
from qcompile.passes.quantize import SitePlan
from qcompile.passes.rotate import Rotate, conflicts, head_bases, stream_obstacle, turn_heads, turn_stream
from qcompile.program import Program
from qcompile.recipe import rewrites
from qcompile.report import PassReport
from qcompile.rotation_flow import rotation_flows
from qcompile.scale_flow import groups_of_readers
from qcompile.sites import find_sites


@dataclass(frozen=True)
class RotatePrincipal(Rotate):
    """Rotate to the principal axes of what was seen; the seed is not used."""


def principal_axes(moment: Tensor) -> Tensor:
    """Eigenvectors of a second moment [n, n], largest first, as columns: x R is uncorrelated; float64."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(1).contiguous()


@rewrites(
    RotatePrincipal,
    exact=True,
    sitewise=True,
    needs=("batches",),
    after=("Untie", "FoldNorm", "Smooth", "SmoothQuantPlus", "AWQ"),
    requires=lambda how: ("FoldNorm",) if how.stream else (),
    conflicts=conflicts,
)
def rotate_principal(program: Program, how: RotatePrincipal, seen: Statistics, plan: SitePlan) -> PassReport:
    """Turn every closed stream and every head basis to its principal axes, in place."""
    report = PassReport("RotatePrincipal")
    streams = []
    for flow in rotation_flows(program) if how.stream else []:
        label, problem = f"stream of {flow.size} at {flow.norms[0].input.name}", stream_obstacle(program, flow)
        if problem is None:
            streams.append((label, flow))
        else:
            report.leave(label, problem.reason, problem.node)
    heads = head_bases(program, report) if how.heads else []

    # One basis serves all readers of a stream: behind their norms every one of them weighs the same.
    watched: dict[fx.Node, tuple[str, int]] = {}
    for label, flow in streams:
        names = {site.name for site in flow.readers}
        for group in groups_of_readers(find_sites(program)):
            if any(site.name in names for site in group.sites):
                watched[group.root] = (label, flow.size)
    for group, source in heads:
        watched[group.root] = (group.sites[0].name, source.head)
    moments = _second_moments(program, plan, watched)

    for label, flow in streams:
        turn_stream(program, flow, principal_axes(moments[label]))
        report.done.append(label)
        report.changed |= {v.name for v in flow.values} | {n.name for norm in flow.norms for n in norm.inner}
    for group, source in heads:
        turn_heads(program, group, source, principal_axes(moments[group.sites[0].name]), report)
    for label, moment in moments.items():
        values = torch.linalg.eigvalsh(moment)
        report.notes.append(f"{label}: {float(values[-1] / values.sum()):.0%} of its energy on one axis")
    return report


def _second_moments(program: Program, plan: SitePlan, watched: dict[fx.Node, tuple[str, int]]) -> dict[str, Tensor]:
    """Sum of x^T x of each label over its nodes, whose last dimension holds blocks of `size` channels."""
    assert plan.batches is not None
    moments = {label: torch.zeros(size, size, dtype=torch.float64) for label, size in watched.values()}

    def see(node: fx.Node, value: Any) -> None:
        label, size = watched[node]
        x = value.detach().reshape(-1, size)
        x = x if x.dtype == torch.float64 else x.float()
        moment = (x.t() @ x).double().cpu()
        if not bool(torch.isfinite(moment).all()):
            raise CalibrationError(f"RotatePrincipal: a batch brings NaN or Inf to {label} (node {node.name}): drop it")
        moments[label] += moment

    count = 0
    for batch in track(plan.batches(), "RotatePrincipal", disable=not plan.progress, transient=True):
        program.watch(watched, batch, see)
        count += 1
    if not count:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    return moments
