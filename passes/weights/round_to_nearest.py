"""Quantize: weights to nearest, activations dynamically, as plain quantize/dequantize around matmuls.

Source: "Give Me BF16 or Give Me Death", arXiv:2411.02355 sec. 3 (round to nearest, dynamic per-token
        activations); MSE clip from GPTQ's code (arXiv:2210.17323).
Law:    |w - dq(q(w))| <= s / 2 inside the range; the inserted graph is the meaning of the result.
        A stack of experts is quantized expert by expert, weight-only: row n of expert e is a row.
Needs:  nothing.   Leaves: sites that a rule keeps, what chooses experts; weights shared with a float
        reader are copied (the other reader keeps the float table).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.calibration.statistics import Statistics
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import shared
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.insert_qdq import matrix_of, put_codes
from qcompile.passes.qdq.site_plan import BEFORE, PlannedSite, Quantize, SitePlan, planned_sites
from qcompile.recipe.recipe import RecipeError
from qcompile.recipe.registry import rewrites
from qcompile.recipe.report import PassReport

ops = torch.ops.qcompile
aten = torch.ops.aten


@rewrites(Quantize, exact=False, sitewise=True, after=BEFORE)
def quantize(program: Program, config: Quantize, statistics: Statistics, plan: SitePlan) -> PassReport:
    """Insert Q/DQ at every wanted site, rounding to nearest, in place."""
    report = PassReport("Quantize")
    for planned in planned_sites(program, config, plan, report):
        name, original = planned.site.name, matrix_of(program, planned.site)

        def make(original: Tensor = original, planned: PlannedSite = planned) -> tuple[Tensor | None, ...]:
            try:
                q = quantize_tensor(original, planned.weight, clip=config.clip)
            except ValueError as error:
                name = planned.site.name
                raise RecipeError(f"Quantize: the weight {name} cannot be quantized: {error}") from error
            return q.stored(), q.scale, q.zero, q.group_scale

        made = shared(("codes", str(planned.weight), config.clip), [original], make)
        program.alive.append(made)
        put_codes(program, planned, made.tensors, plan)
        report.done.append(name)
    return report
