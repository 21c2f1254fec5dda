"""Quantizing site after site, each on the inputs that the quantized part of the model gives it.

What GPTQ, DGQ and every algorithm share that chooses codes by the second moments of a site's input: a layerwise run in
graph order (qcompile/calibration/layerwise_run.py), and one Hessian for all sites that read the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.calibration.hessian import Gram, hessian_of, refuse_infinite
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.program import Program
from qcompile.memory.process import release_freed_memory
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.insert_qdq import matrix_of, put_codes
from qcompile.passes.qdq.site_plan import PlannedSite, Quantize, planned_sites
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class Choice:
    """What an algorithm chose for a weight.

    Attributes:
        codes: the quantized weight.
        fell_back: whether it is rounded to nearest because the Hessian is singular.
    """

    codes: QTensor
    fell_back: bool = False


Choose = Callable[[Tensor, Tensor, Format], Choice]
"""weight [N, K] float32 (sites on one input, stacked), Hessian [K, K] float64, format -> codes."""

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
            q = quantize_tensor(matrix_of(program, planned.site), planned.weight)
            put_codes(program, planned, q.stored_parts, context)
            report.done.append(planned.site.name)
            report.notes.append(
                f"{planned.site.name}: the logits in {planned.weight} are rounded to nearest, unclipped"
            )
        else:
            groups.setdefault((planned.site.input, planned.weight), []).append(planned)
    run = context.layerwise_run(program)
    for (_, form), members in context.track(groups.items(), report.name):
        run.advance(members[0].site.node)
        release_freed_memory()
        if members[0].site.kind == "experts":
            for planned in members:
                q, fell_back = _experts(program, run, planned, choose)
                fallbacks += fell_back
                put_codes(program, planned, q.stored_parts, context)
                report.done.append(planned.site.name)
                if aim is not None:
                    report.notes.append(f"{planned.site.name}: experts read other rows once routing differs; GPTQ")
            continue
        weights = torch.cat([program.weights[w.site.name].float() for w in members])
        if aim is None or reference is None:
            hessian = hessian_of(run, members[0].site)
        else:
            hessian, cross = reference.moments(run, members[0])
            weights = aim(weights, hessian, cross)
        choice = choose(weights, hessian, form)
        if choice.fell_back:
            fallbacks += [planned.site.name for planned in members]
        for planned, q in zip(members, choice.codes.split([w.site.N for w in members]), strict=True):
            put_codes(program, planned, q.stored_parts, context)
            report.done.append(planned.site.name)
    report.notes += run.notes()
    if fallbacks:
        report.notes.append(f"singular Hessian, rounded to nearest: {', '.join(fallbacks)}")
    return report


class FloatReference:
    """The float program, run layer by layer beside the one that is being quantized."""

    def __init__(self, program: Program, context: PassContext) -> None:
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.run = LayerwiseRun(program, context.data())

    def moments(self, quantized: LayerwiseRun, planned: PlannedSite) -> tuple[Tensor, Tensor]:
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
        refuse_infinite(quantized, site, sums.sums)
        return sums.whole(), cross


def as_rounded(x: Tensor, act: Format) -> Tensor:
    """What a site reads once its input is quantized to `act`."""
    return quantize_tensor(x, act).dequantize().to(x.dtype)


def _experts(program: Program, run: LayerwiseRun, planned: PlannedSite, choose: Choose) -> tuple[QTensor, list[str]]:
    """Codes of a stack [E N, K], each expert's by the rows that are routed to it, and the experts that fell back.

    An expert that no row reached has a Hessian of zeros: every algorithm then rounds to nearest.
    """
    site, found, fallbacks = planned.site, list[QTensor](), list[str]()
    ends = [value.tolist() for value in run.values_of(site.node.all_input_nodes[2])] if site.grouped else []

    def rows_of(expert: int) -> Iterator[Tensor]:
        for batch, (x, tokens) in enumerate(zip(run.values_of(site.input), run.tokens_along(site.input), strict=True)):
            if site.batched:
                own: int | slice = expert
            else:
                own = slice(int(ends[batch][expert - 1]) if expert else 0, int(ends[batch][expert]))
            yield x[own] if tokens is None else x[own][tokens[own]]

    for expert, weight in enumerate(matrix_of(program, site).float().split(site.N)):
        sums = Gram(site.K, weight.device)
        for rows in rows_of(expert):
            sums.add(rows.float())
        choice = choose(weight, sums.whole(), planned.weight)
        found.append(choice.codes)
        if choice.fell_back:
            fallbacks.append(f"{site.name}[{expert}]")
    zeros = [_as_rows(q.zero) for q in found if q.zero is not None]
    group_scales = [q.group_scale for q in found if q.group_scale is not None]
    whole = QTensor(
        torch.cat([q.codes for q in found]),
        torch.cat([_as_rows(q.scale) for q in found]),
        torch.cat(zeros) if zeros else None,
        torch.cat(group_scales) if group_scales else None,
        planned.weight,
    )
    return whole, fallbacks


def _as_rows(part: Tensor) -> Tensor:
    """One scale for a whole matrix, as a row of its own."""
    return part if part.ndim else part.reshape(-1, 1)
