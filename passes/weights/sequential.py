"""Quantizing site after site, each on the inputs that the quantized part of the model gives it.

What GPTQ, DGQ and every algorithm share that chooses codes by the second moments of a site's input: a layerwise run in
graph order (qcompile/calibration/layerwise_run.py), and one Hessian for all sites that read the same value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.calibration.hessian import Gram, hessian_of, refuse_infinite
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.program import Program
from qcompile.memory.process import release_freed_memory
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_matrix, quantize_tensor
from qcompile.passes.qdq.insert_qdq import matrix_of, put_codes
from qcompile.passes.qdq.site_plan import PlannedSite, Quantize, planned_sites
from qcompile.passes.weights.choice import Choose, damage, stacked
from qcompile.passes.weights.expert_codes import expert_codes
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import PassReport
from qcompile.recipe.solved_sites import SolvedSites, solve_together

Aim = Callable[[Tensor, Tensor, Tensor], Tensor]
"""weight [N, K], Hessian X X^T, and X~ X^T with the float model's inputs X~ -> the weight to aim at."""


def quantize_sequentially(
    program: Program, config: Quantize, context: PassContext, report: PassReport, choose: Choose, aim: Aim | None = None
) -> PassReport:
    """Quantize every planned site in place, in the order of the graph.

    The logits, where the recipe gives them eight bits of their own, are rounded to nearest, and the
    report says so: the largest matrix of a small model, and eight bits lose nothing that a search could
    win back.

    Args:
        program: changed in place.
        config: formats.
        context: of the program, with batches.
        report: of the pass; filled in.
        choose: the algorithm.
        aim: the weights to aim at. With it the float program runs beside the quantized one, and inputs are
            rounded as activations are.

    Returns:
        `report`, with a note on sites where the algorithm fell back to round-to-nearest.
    """
    reference = FloatReference(program.copy(), context) if aim is not None else None
    fallbacks: list[str] = []
    groups: dict[tuple[torch.fx.Node, Format], list[PlannedSite]] = {}
    for planned in planned_sites(config, context, report):
        if planned.is_lm_head and planned.weight.bits >= 8:
            put_codes(program, planned, quantize_matrix(matrix_of(program, planned.site), planned.weight), context)
            report.done.append(planned.site.name)
            report.notes.append(
                f"{planned.site.name}: the logits in {planned.weight} are rounded to nearest, unclipped"
            )
        else:
            groups.setdefault((planned.site.input, planned.weight), []).append(planned)
    run = context.layerwise_run(program, shared=True)
    owners = context.ranks.owners([sum(w.site.K**3 + w.site.N * w.site.K**2 for w in ws) for ws in groups.values()])
    for ((_, form), members), owner in context.track(list(zip(groups.items(), owners, strict=True)), report.name):

        def solve(is_owner: bool, form: Format = form, members: list[PlannedSite] = members) -> SolvedSites | None:
            if context.finished is not None and reference is None:  # two runs side by side are computed again
                context.finished.restore_run(run)
                run.advance(members[0].site.node)
                context.finished.keep_run(run)
            run.advance(members[0].site.node)
            release_freed_memory()
            if members[0].site.kind == "experts":
                return expert_codes(program, run, members, choose, context.finished, is_owner)
            if reference is None or aim is None:
                hessian, cross = hessian_of(run, members[0].site, context.ranks), None
            else:
                hessian, cross = reference.moments(run, members[0], context.ranks)
            if not is_owner:
                return None
            weights = stacked([program.weights[w.site.name] for w in members])
            if aim is not None and cross is not None:
                weights = aim(weights, hessian, cross)
            choice = choose(weights, hessian, form)
            parts = [q.stored_parts for q in choice.codes.split([w.site.N for w in members])]
            fell_back = [planned.site.name for planned in members if choice.fell_back]
            return SolvedSites(parts, fell_back, damage(weights, hessian, choice.codes))

        names = [planned.site.name for planned in members]
        solved = solve_together(context.finished, names, owner, solve)
        fallbacks += solved.fell_back
        for planned, parts in zip(members, solved.parts, strict=True):
            put_codes(program, planned, parts, context)
            report.done.append(planned.site.name)
            if planned.site.name in context.sites:
                context.sites[planned.site.name].output_error = solved.damage
            if aim is not None and planned.site.kind == "experts":
                report.notes.append(f"{planned.site.name}: experts read other rows once routing differs; GPTQ")
    report.notes += run.notes()
    if fallbacks:
        report.notes.append(f"singular Hessian, rounded to nearest: {', '.join(fallbacks)}")
    return report


class FloatReference:
    """The float program, run layer by layer beside the one that is being quantized."""

    def __init__(self, program: Program, context: PassContext) -> None:
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.run = context.layerwise_run(program, shared=True)

    def moments(self, quantized: LayerwiseRun, planned: PlannedSite, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """X X^T and X~ X^T, float64 [K, K]: X the site's rounded inputs, X~ those of the float program.

        Every token counts alike, divided by the root mean square of its float input: else the few tokens with
        massive activations would decide where the weight moves to.

        Raises:
            CalibrationError: NaN or Inf in an input, with the batch and the site.
        """
        site, act = planned.site, planned.act
        self.run.advance(self.nodes[site.node.name])
        device = quantized.program.weights[site.name].device
        sums, cross = Gram(site.K, device), torch.zeros(site.K, site.K, dtype=torch.float64, device=device)
        pairs = zip(quantized.rows_of(site.input), self.run.rows_of(self.nodes[site.input.name]), strict=True)
        for batch, (x, exact) in enumerate(pairs, 1):
            aim = exact.float()
            size = aim.square().mean(-1, keepdim=True)
            if not bool(torch.isfinite(size).all()):
                raise CalibrationError(
                    f"batch {batch} brings NaN or Inf to {site.name} (node {site.input.name}) in the float model. "
                    "Fix: drop it, or calibrate in float32"
                )
            even = torch.where(size > 0, size.rsqrt(), 0)  # a token whose float input is 0 has no say
            rows = (x if act is None else as_rounded(x, act)).float() * even
            sums.add(rows)
            cross += (aim * even).t() @ rows
        for tensor in (sums.sums, cross):
            ranks.add(tensor)
        refuse_infinite(quantized, site, sums.sums)
        return sums.whole(), cross


def as_rounded(x: Tensor, act: Format) -> Tensor:
    """What a site reads once its input is quantized to `act`."""
    return quantize_tensor(x, act).dequantize().to(x.dtype)
