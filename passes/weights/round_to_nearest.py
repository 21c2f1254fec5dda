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

from torch import Tensor

from qcompile.ir.program import Program
from qcompile.memory import weight_cache
from qcompile.numerics.qtensor import StoredParts
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.insert_qdq import matrix_of, put_codes
from qcompile.passes.qdq.site_plan import PlannedSite, Quantize, planned_sites
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@rewrites(Quantize, Stage.QUANTIZE, exact=False)
def round_to_nearest(program: Program, config: Quantize, context: PassContext) -> PassReport:
    """Insert Q/DQ at every planned site, rounding to nearest, in place."""
    report = PassReport("Quantize")
    for planned in planned_sites(config, context, report):
        original = matrix_of(program, planned.site)

        def make(original: Tensor = original, planned: PlannedSite = planned) -> StoredParts:
            try:
                return quantize_tensor(original, planned.weight, clip=config.clip).stored_parts
            except ValueError as error:
                name = planned.site.name
                raise RecipeError(
                    f"Quantize: the weight {name} cannot be quantized to {planned.weight}: {error}"
                ) from error

        cached = weight_cache.cached(("codes", str(planned.weight), config.clip), [original], make)
        program.alive.append(cached)
        put_codes(program, planned, cached.tensors, context)
        report.done.append(planned.site.name)
    return report
