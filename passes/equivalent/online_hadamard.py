"""OnlineHadamard: a Hadamard transform at run time before products of activations.

Source: QuaRot, arXiv:2404.00456 sec. 4 stage 1c (before the last projection of a feed-forward).
Law:    x W^T = (x R) (W R)^T  with R = diag(signs) H / sqrt(n).
Keeps:  the output; W R is computed in float64 and cast once, x R in n log n at run time.
Needs:  nothing.
Skips:  sites whose input is no product and no activation function (streams and the values of attention can be
        rotated offline), sizes without a Hadamard matrix, tied weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qcompile.analysis.tied_weights import tied_obstacle
from qcompile.ir.aten_ops import ACTIVATIONS, aten
from qcompile.ir.op_calls import HadamardCall
from qcompile.ir.program import Program
from qcompile.numerics.hadamard import apply_hadamard, hadamard_factors, random_signs
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport

GATED = ACTIVATIONS | {aten.mul.Tensor}
"""What gives the values that are transformed: an activation function, or the product of a gate."""


@dataclass(frozen=True)
class OnlineHadamard(PassConfig):
    """Transform the inputs that a gate or an activation function gives."""

    # Of the random signs before the Hadamard matrix; inputs of one size share them.
    seed: int = 0


@rewrites(OnlineHadamard, Stage.ONLINE, exact=True)
def online_hadamard(program: Program, config: OnlineHadamard, context: PassContext) -> PassReport:
    """Insert one transform behind each such value and fold its inverse into the consumers."""
    report = PassReport("OnlineHadamard")
    for consumers in context.facts.consumers:
        root: fx.Node = consumers.root
        if root in context.facts.norm_outputs or root.target not in GATED or not consumers.sites:
            continue
        label, n = consumers.sites[0].name, consumers.sites[0].K
        tied = tied_obstacle(consumers.sites)
        if consumers.other_consumers:
            report.skip(label, "the value is read by something that is not a site", consumers.other_consumers[0].name)
        elif tied is not None:
            report.skip(label, tied.reason, tied.node)
        elif hadamard_factors(n) is None:
            report.skip(label, f"no Hadamard matrix of {n} is known")
        else:
            signs = random_signs(n, config.seed)
            name = f"hadamard{n}.signs"
            if name not in program.weights:
                program.add_weight(name, signs.float().to(program.weights[label].device))
            dtype = program.weights[label].dtype
            rotated = HadamardCall(root, program.node_of(name)).insert(program, after=root)
            program.replace(root, rotated)
            for site in consumers.sites:
                weight = program.weights[site.name].double()
                program.weights[site.name] = apply_hadamard(weight, signs).to(dtype)
            k, m = hadamard_factors(n) or (0, 0)
            report.done.append(label)
            note = f"online Hadamard {k}*{2**m} for {n} channels"
            if note not in report.notes:
                report.notes.append(note)
            # What lies between the root and the sites carries the rotated value.
            report.changed |= {site.input.name for site in consumers.sites} - {root.name}
    return report
