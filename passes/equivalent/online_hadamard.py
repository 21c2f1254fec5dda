"""Rotate online: a Hadamard transform at run time before products of activations.

Source: QuaRot, arXiv:2404.00456 sec. 4 stage 1c (before the last projection of a feed-forward).
Law:    x W^T = (x R) (W R)^T  with R = diag(signs) H / sqrt(n).
Keeps:  the output.   Needs: nothing.   W R in float64, cast once; x R in n log n at run time.
Leaves: sites whose input is no product or activation (a stream or attention can be turned offline),
        sizes without a Hadamard matrix, shared weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qcompile.analysis.norms import find_norms
from qcompile.analysis.scale_folding import groups_of_readers
from qcompile.analysis.sites import find_sites
from qcompile.calibration.statistics import Statistics
from qcompile.ir.program import Program
from qcompile.numerics.hadamard import apply_hadamard, factor, random_signs
from qcompile.recipe.registry import rewrites
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ACTIVATIONS = {
    aten.mul.Tensor,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.tanh.default,
    aten.sigmoid.default,
}


@dataclass(frozen=True)
class RotateOnline:
    """Transform the inputs that come out of a gate or an activation function."""

    seed: int = 0


@rewrites(RotateOnline, exact=True, after=("Untie", "FoldNorm", "Smooth", "Rotate"))
def rotate_online(program: Program, how: RotateOnline, seen: Statistics) -> PassReport:
    """Insert one transform before each such input and fold its inverse into the readers."""
    report = PassReport("RotateOnline")
    norm_outputs = {norm.output for norm in find_norms(program)}
    for readers in groups_of_readers(find_sites(program)):
        root: fx.Node = readers.root
        if root in norm_outputs or root.target not in ACTIVATIONS or not readers.sites:
            continue
        label, n = readers.sites[0].name, readers.sites[0].K
        shared = [site for site in readers.sites if site.shared_with]
        if readers.strangers:
            report.leave(label, "the value is read by something that is not a site", readers.strangers[0].name)
        elif shared:
            report.leave(label, f"the weight {shared[0].name} is shared: untie it")
        elif factor(n) is None:
            report.leave(label, f"no Hadamard matrix of {n} is known")
        else:
            signs = random_signs(n, how.seed)
            name = f"hadamard{n}.signs"
            if name not in program.weights:
                program.add_weight(name, signs.float().to(program.weights[label].device))
            dtype = program.weights[label].dtype
            turned = program.insert(torch.ops.qcompile.hadamard.default, (root, program.node_of(name)), after=root)
            root.replace_all_uses_with(turned, delete_user_cb=lambda user, new=turned: user is not new)
            for site in readers.sites:
                weight = program.weights[site.name].double()
                program.weights[site.name] = apply_hadamard(weight, signs).to(dtype)
            k, m = factor(n) or (0, 0)
            report.done.append(label)
            note = f"online Hadamard {k}*{2**m} for {n} channels"
            if note not in report.notes:
                report.notes.append(note)
            # What lies between the product and the reader carries the turned value.
            report.changed |= {site.input.name for site in readers.sites} - {root.name}
    return report
