"""SmoothQuant+: one smoothing strength for the whole model, searched with errors accumulated.

Source: Pan et al. 2023, arXiv:2312.03788 sec. 3. The authors published no search; theirs is described
        as the alpha with the least squared error of the whole quantized model. Here the loss is the
        divergence of the logits, quantized layers feeding later ones: by squared error of the logits
        the winner can be worse than no smoothing (docs/algorithms/smoothquant-plus.md).
Law:    s = max|X|^a / max|W|^(1-a) as in smoothquant.py, for a in 0, step .. 1, and *no smoothing* as a
        candidate of its own (a = 0 is not it: it equalises the weights). Ours: each a is tried for all
        inputs, for those that a norm makes, and for those that linear rows make; a rotated residual
        stream has no outliers left behind its norms, while inner products keep theirs. Candidates are
        ranked on one batch without the clip search; the best two and no smoothing are then held
        against each other as the pass behind will round, on all batches: the winner's loss is not
        above the identity's.
Keeps:  the output.   Needs: absmax of the inputs and the batches.   Leaves: what Smooth leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qcompile.ir.program import Program
from qcompile.numerics.divergence import kl_divergence, relative_squared_error
from qcompile.numerics.format import Format
from qcompile.passes.equivalent.awq import rounds_otherwise
from qcompile.passes.equivalent.smoothquant import SmoothQuant, smoothquant
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.passes.weights.round_to_nearest import round_to_nearest
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError

_FINALISTS = 2  # candidates whose loss is computed with the clip search, which is most of the work


@dataclass(frozen=True)
class SmoothQuantPlus(PassConfig):
    """The format that the search rounds to, and the grid of alpha."""

    weight: Format = Format("int4", "group", 128, "int")
    clip: bool = False  # whether the Quantize pass behind it searches clips: the search sees the same rounding
    step: float = 0.1  # of alpha; the paper's is 0.05
    batches: int = 4  # of the calibration data, for the loss of the finalists
    logits: bool = True  # whether the first output holds logits [.., V]; without, the loss is its squared error

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step <= 1 or self.batches < 1:
            raise RecipeError(f"SmoothQuantPlus: 0 < step <= 1 and batches >= 1, got {self.step} and {self.batches}")


@rewrites(
    SmoothQuantPlus,
    Stage.SMOOTH,
    exact=True,
    needs=("absmax", "batches"),
    conflicts=lambda config, passes: (
        ["SmoothQuantPlus and Smooth do the same twice: drop SmoothQuant"]
        * any(isinstance(p, SmoothQuant) for p in passes)
        + rounds_otherwise(config, passes)
    ),
)
def smoothquant_plus(program: Program, config: SmoothQuantPlus, context: PassContext) -> PassReport:
    """Search alpha on quantized copies, then smooth the program with the winner, in place."""
    data = [batch for _, batch in zip(range(config.batches), context.data(), strict=False)]
    want = [first_output(program, batch) for batch in data]
    coarse = dataclasses.replace(config, clip=False)
    ranked = {
        candidate: loss_of(program, coarse, context, candidate, data[:1], want[:1])
        for candidate in context.track(candidates(config), "SmoothQuant+")
    }
    finalists: list[SmoothQuant | None] = [None, *sorted(ranked, key=ranked.__getitem__)[:_FINALISTS]]
    losses = {
        candidate: loss_of(program, config, context, candidate, data, want)
        for candidate in context.track(finalists, "SmoothQuant+, the best")
    }
    best = min(losses, key=losses.__getitem__)
    report = PassReport("SmoothQuantPlus")
    if best is not None:
        report = dataclasses.replace(smoothquant(program, best, context), name="SmoothQuantPlus")
    report.notes.append(f"{describe(best)}: loss {losses[best]:.4g}, without smoothing {losses[None]:.4g}")
    return report


def candidates(config: SmoothQuantPlus) -> list[SmoothQuant]:
    """Every strength, everywhere and in either kind of place alone."""
    grid = [min(1.0, i * config.step) for i in range(round(1 / config.step) + 1)]
    return [SmoothQuant(alpha, *where) for where in ((True, True), (True, False), (False, True)) for alpha in grid]


def describe(candidate: SmoothQuant | None) -> str:
    """A candidate as the report names it."""
    if candidate is None:
        return "no smoothing"
    only = "" if candidate.norms and candidate.rows else f" behind {'norms' if candidate.norms else 'linear rows'} only"
    return f"alpha {candidate.alpha:.2f}{only}"


def loss_of(
    program: Program,
    config: SmoothQuantPlus,
    context: PassContext,
    candidate: SmoothQuant | None,
    data: list[Sequence[Any]],
    want: list[Tensor],
) -> float:
    """Divergence from the outputs `want` after smoothing as a candidate does (None: not) and rounding all weights."""
    tried = program.copy()
    if candidate is not None:
        smoothquant(tried, candidate, context.on(tried))
    weights_only = Quantize(config.weight, None, clip=config.clip)
    round_to_nearest(tried, weights_only, context.on(tried, keep_float_weights=False))
    tried.cleanup()
    measure = kl_divergence if config.logits else relative_squared_error
    pairs = zip(data, want, strict=True)
    return sum(float(measure(value, first_output(tried, batch))) for batch, value in pairs) / len(data)


def first_output(program: Program, batch: Sequence[Any]) -> Tensor:
    """Logits, or the output of an encoder. (A hidden value would not do: smoothing rescales those on purpose.)"""
    found: Tensor = program(*batch)[0]
    return found
