"""Quantize: weights rounded to nearest, activations dynamically, as quantize/dequantize around matmuls.

Source: "Give Me BF16 or Give Me Death", arXiv:2411.02355 sec. 3 (round to nearest, dynamic per-token
        activations); MSE clip from GPTQ's code (arXiv:2210.17323).
Law:    |w - dq(q(w))| <= s / 2 inside the range; the inserted graph is the meaning of the result.
        A stack of experts is quantized expert by expert, weight-only: row n of expert e is a row.
Keeps:  nothing exactly: the output within what rounding changes.
Needs:  nothing.
Skips:  sites that a rule keeps, what chooses experts. Weights shared with a float consumer are copied: that consumer
        keeps the float table.
"""

from __future__ import annotations

import functools

from qcompile.ir.program import Program
from qcompile.memory import weight_cache
from qcompile.memory.stored_tensor import StoredTensor, loaded
from qcompile.numerics.qtensor import StoredParts
from qcompile.numerics.rounding import quantize_matrix
from qcompile.passes.qdq.insert_qdq import matrix_of, put_codes
from qcompile.passes.qdq.site_plan import PlannedSite, Quantize, planned_sites
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError
from qcompile.recipe.solved_sites import SolvedSites, solve_each


@rewrites(Quantize, Stage.QUANTIZE, exact=False)
def round_to_nearest(program: Program, config: Quantize, context: PassContext) -> PassReport:
    """Insert Q/DQ at every planned site, rounding to nearest, in place."""
    report = PassReport("Quantize")
    sites = planned_sites(config, context, report)
    work = [([planned.site.name], functools.partial(_solve, program, planned, config.clip)) for planned in sites]
    for planned, solved in zip(sites, solve_each(context.finished, work), strict=True):
        put_codes(program, planned, solved.parts[0], context)
        report.done.append(planned.site.name)
    return report


def _solve(program: Program, planned: PlannedSite, clip: bool) -> SolvedSites:
    """The codes of a site, made once for equal weights in memory."""
    original = loaded(matrix_of(program, planned.site))

    def make() -> StoredParts:
        try:
            return quantize_matrix(original, planned.weight, clip=clip)
        except ValueError as error:
            raise RecipeError(
                f"Quantize: the weight {planned.site.name} cannot be quantized to {planned.weight}: {error}"
            ) from error

    if isinstance(program.weights[planned.site.name], StoredTensor):  # read again, it would be another tensor
        return SolvedSites([make()])
    cached = weight_cache.cached(("codes", str(planned.weight), clip), [original], make)
    program.alive.append(cached)
    return SolvedSites([cached.tensors])
