"""FineQuant: a group size for each matrix, found from the weights alone, under a bits budget.

Source: Kim et al. 2023, arXiv:2308.09723 (adaptive granularity: finer groups only where coarse ones
        collapse). The paper's threshold on shrinking ranges is replaced by what it stands for, the
        measured rounding error, and its free parameter by a budget.
Law:    each matrix starts at the coarsest size; the step to a finer one that takes off the most
        relative error ||W - W^||^2 / ||W||^2 for each added byte is taken while the budget allows.
        The average never exceeds the budget, and the total relative error is not worse than that
        of any single size within it.
Needs:  nothing.
Skips:  what Quantize skips. Sites with a format from a rule keep it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from torch import Tensor

from qcompile.ir.program import Program
from qcompile.memory.stored_tensor import loaded
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_matrix, quantize_tensor
from qcompile.passes.qdq.insert_qdq import matrix_of, put_codes
from qcompile.passes.qdq.site_plan import PlannedSite, Quantize, planned_sites
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError
from qcompile.recipe.solved_sites import SolvedSites, solve_each


@dataclass(frozen=True)
class FineQuant(Quantize):
    """Group sizes to choose from and bits to spend; lm_head and clip as for Quantize."""

    # The format but for its group size, which one of `group_sizes` replaces.
    weight: Format = Format("int4", "group", 128, "int")
    # Format of activations; None: they stay float, as in the paper.
    act: Format | None = None
    # Columns of a group to choose from for each matrix.
    group_sizes: tuple[int, ...] = (256, 128, 64, 32)
    # The budget: bits of storage a weight, scales and zero points included, on average over the matrices.
    # 4.4 is above what groups of 128 cost, so that some matrices get finer ones.
    bits: float = 4.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight.per != "group":
            raise RecipeError(f"FineQuant chooses group sizes, and the format {self.weight} has no groups")
        if not self.group_sizes or min(self.group_sizes) < 1:
            raise RecipeError(f"FineQuant: group_sizes must be positive, got {self.group_sizes}")
        if self.bits <= self.weight.bits:
            raise RecipeError(
                f"FineQuant: {self.bits} bits leave nothing for scales beside {self.weight.bits}-bit codes"
            )


def spend(errors: list[list[float]], costs: list[list[int]], budget: float) -> list[int]:
    """Choose one option for each matrix so that the costs stay within the budget.

    Args:
        errors: for each matrix, of each option.
        costs: for each matrix, of each option; bytes.
        budget: bytes, of the sum of costs.

    Returns:
        The index of the option of each matrix. The cheapest ones where even they exceed the budget.
    """
    cheapest = [min(range(len(c)), key=c.__getitem__) for c in costs]
    chosen, spent = list(cheapest), sum(c[i] for c, i in zip(costs, cheapest, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for which, (error, cost) in enumerate(zip(errors, costs, strict=True)):
            now = chosen[which]
            for option in range(len(cost)):
                gain, price = error[now] - error[option], cost[option] - cost[now]
                if gain > 0 and price > 0 and spent + price <= budget:
                    rate = gain / price
                    if best is None or rate > best[0]:
                        best = (rate, which, option)
        if best is None:
            break
        _, which, option = best
        spent += costs[which][option] - costs[which][chosen[which]]
        chosen[which] = option
    uniform = [[option] * len(costs) for option in range(min(map(len, costs)))]

    def total(choice: list[int]) -> float:
        return sum(e[i] for e, i in zip(errors, choice, strict=True))

    within = [u for u in uniform if sum(c[i] for c, i in zip(costs, u, strict=True)) <= budget]
    return min([chosen, *within], key=total)


def relative_error(weight: Tensor, form: Format, clip: bool) -> tuple[float, int]:
    """||W - W^||^2 / ||W||^2 of one matrix in one format, and its stored bytes."""
    q = quantize_tensor(weight, form, clip=clip)
    wide = weight.float()
    return float((q.dequantize() - wide).square().sum() / wide.square().sum().clamp_min(1e-30)), q.nbytes


@rewrites(FineQuant, Stage.QUANTIZE, exact=False)
def finequant(program: Program, config: FineQuant, context: PassContext) -> PassReport:
    """Choose sizes for all planned sites together, then round to nearest, in place."""
    report = PassReport("FineQuant")
    planned = planned_sites(config, context, report)
    free = [index for index, w in enumerate(planned) if w.weight == config.weight]
    errors, costs, weights = [], [], 0
    for index in context.track(free, "FineQuant"):
        weight = loaded(matrix_of(program, planned[index].site))
        options = [relative_error(weight, _sized(config.weight, size), config.clip) for size in config.group_sizes]
        errors.append([error for error, _ in options])
        costs.append([cost for _, cost in options])
        weights += weight.numel()
    if free:
        least = 8 * sum(map(min, costs)) / weights
        if least > config.bits:
            raise RecipeError(
                f"FineQuant: the coarsest groups of {config.group_sizes} already take {least:.3f} bits a weight, "
                f"the budget is {config.bits}. Fix: more bits or a larger size"
            )
        chosen = spend(errors, costs, config.bits * weights / 8)
        for index, option in zip(free, chosen, strict=True):
            planned[index] = dataclasses.replace(
                planned[index], weight=_sized(config.weight, config.group_sizes[option])
            )
        spent = 8 * sum(c[i] for c, i in zip(costs, chosen, strict=True)) / weights
        shares = {size: sum(config.group_sizes[i] == size for i in chosen) for size in config.group_sizes}
        report.notes.append(f"{spent:.3f} bits a weight; " + ", ".join(f"group {s}: {n}" for s, n in shares.items()))
    work = [([site.site.name], functools.partial(_round, program, site, config.clip)) for site in planned]
    for site, solved in zip(planned, solve_each(context.finished, work), strict=True):
        put_codes(program, site, solved.parts[0], context)
        report.done.append(site.site.name)
    return report


def _round(program: Program, site: PlannedSite, clip: bool) -> SolvedSites:
    return SolvedSites([quantize_matrix(loaded(matrix_of(program, site.site)), site.weight, clip=clip)])


def _sized(form: Format, size: int) -> Format:
    return dataclasses.replace(form, group=size)
