"""OnlineHadamard: a Hadamard transform at run time before products of activations.

Source: QuaRot, arXiv:2404.00456 sec. 4 stage 1c (before the last projection of a feed-forward).
Law:    x W^T = (x R) (W R)^T  with R = diag(signs) H / sqrt(n).
Keeps:  the output; W R is computed in float64 and cast once, x R in n log n at run time.
Needs:  nothing.
Skips:  sites whose input is no product and no activation function and, with `norms`, no norm of a stream that stays as
        it is (other streams and the values of attention can be rotated offline), sizes without a Hadamard matrix, tied
        weights, sites that stay float.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.scale_folding import Consumers
from qcompile.analysis.sites import Site
from qcompile.analysis.tied_weights import tied_obstacle
from qcompile.ir.aten_ops import ACTIVATIONS, aten
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.op_calls import HadamardCall
from qcompile.ir.program import Program
from qcompile.numerics.hadamard import apply_hadamard, hadamard_factors, random_signs
from qcompile.passes.equivalent.rotate import stream_obstacle
from qcompile.passes.qdq.site_plan import chooses_experts
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport

GATED = ACTIVATIONS | {aten.mul.Tensor}
"""What gives the values that are transformed: an activation function, or the product of a gate."""


@dataclass(frozen=True)
class OnlineHadamard(PassConfig):
    """Transform the inputs that a gate or an activation function gives, and those of streams without a rotation."""

    # Of the random signs before the Hadamard matrix; inputs of one size share them.
    seed: int = 0
    # Transform also the inputs that norms give whose stream cannot be rotated offline (sandwich norms, post-norm
    # encoders, models in two halves). Costs n log n per token at each of them.
    norms: bool = False


@rewrites(OnlineHadamard, Stage.ONLINE, exact=True)
def online_hadamard(program: Program, config: OnlineHadamard, context: PassContext) -> PassReport:
    """Insert one transform behind each such value and fold its inverse into the sites that read it."""
    report = PassReport("OnlineHadamard")
    of_open_streams = _norms_of_open_streams(program, context) if config.norms else set[fx.Node]()
    for consumers in context.facts.consumers:
        root = consumers.root
        apart = root in of_open_streams
        if not apart and (root.target not in GATED or root in context.facts.norm_outputs):
            continue
        sites = tuple(site for site in consumers.sites if not chooses_experts(site))
        if not sites:
            continue
        n = sites[0].K
        obstacle = _obstacle(consumers, sites, n, context, apart)
        if obstacle is not None:
            report.skip(sites[0].name, obstacle.reason, obstacle.node)
            continue
        _transform(program, sites, n, config.seed)
        k, m = hadamard_factors(n) or (0, 0)
        report.done.append(sites[0].name)
        note = f"online Hadamard {k}*{2**m} for {n} channels"
        if note not in report.notes:
            report.notes.append(note)
    return report


def _norms_of_open_streams(program: Program, context: PassContext) -> set[fx.Node]:
    """The outputs of norms whose stream keeps its basis: what a rotation before this pass could not reach."""
    sites = context.facts.sites
    streams = [stream for stream in context.facts.streams if stream_obstacle(program, stream, sites) is not None]
    return {norm.output for stream in streams for norm in stream.norms}


def _obstacle(
    consumers: Consumers, sites: tuple[Site, ...], n: int, context: PassContext, apart: bool
) -> Obstacle | None:
    """Why sites cannot read their value transformed, or why that would be of no use; None if they can.

    Args:
        consumers: of the value.
        sites: those of them that would.
        n: channels of the value.
        context: of the pass.
        apart: whether the other consumers may go on reading the value as it is.
    """
    tied = tied_obstacle(sites)
    if tied is not None:
        return tied
    if consumers.other_consumers and not apart:
        return Obstacle(consumers.other_consumers[0].name, "the value is read by something that is not a site")
    if any(site.name in context.keep_float for site in sites):
        return Obstacle(consumers.root.name, "a site that reads it stays float")
    if any(site.input.meta.get(WRITTEN) for site in sites):
        return Obstacle(consumers.root.name, "an operator in place writes to the value")
    if hadamard_factors(n) is None:
        return Obstacle(consumers.root.name, f"no Hadamard matrix of {n} is known")
    return None


def _transform(program: Program, sites: tuple[Site, ...], n: int, seed: int) -> None:
    """Give sites R x instead of x; whatever else reads x goes on reading it."""
    name, signs = f"hadamard{n}.signs", random_signs(n, seed)
    if name not in program.weights:
        program.add_weight(name, signs.float().to(program.weights[sites[0].name].device))
    # Right before the sites, whatever lies between them and the root: there a module of the model can hold it.
    for value in dict.fromkeys(site.input for site in sites):
        rotated = HadamardCall(value, program.node_of(name)).insert(program, after=value)
        for site in sites:
            site.node.replace_input_with(value, rotated)
    for weight in dict.fromkeys(site.name for site in sites):
        old = program.weights[weight]
        program.weights[weight] = apply_hadamard(old.double(), signs).to(old.dtype)
