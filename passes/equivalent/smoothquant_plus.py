"""SmoothQuant+: one smoothing strength for the whole model, searched with errors accumulated.

Source: Pan et al. 2023, arXiv:2312.03788 sec. 3. The authors published no search; theirs is described
        as the alpha with the least squared error of the whole quantized model. Here the loss is the
        divergence of the logits, quantized layers feeding later ones: by squared error of the logits
        the winner can be worse than no smoothing (docs/algorithms/smoothquant-plus.md).
Law:    s = max|X|^a / max|W|^(1-a) as in smoothquant.py, for a in 0, step .. 1, and *no smoothing* as a
        candidate of its own (a = 0 is not it: it equalizes the weights). Ours: each a is tried for all
        inputs, for those that a norm gives, and for those that linear rows give; a rotated residual
        stream has no outliers behind its norms, while inner products keep theirs. Candidates are
        ranked on one batch without the clip search; the best two and no smoothing are then compared
        with the rounding of the pass behind, on all batches: the winner's loss is not above that of
        no smoothing.
Keeps:  the output.
Needs:  absmax of the inputs and the batches.
Skips:  what SmoothQuant skips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qcompile.calibration.padding import BatchTokens, TokenMask
from qcompile.ir.program import Program
from qcompile.numerics.divergence import kl_divergence, relative_squared_error
from qcompile.numerics.format import Format
from qcompile.passes.equivalent.awq import rounding_conflicts
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

    # Weight format of the quantizing pass behind it, to which the search rounds as well.
    weight: Format = Format("int4", "group", 128, "int")
    # Whether that pass searches the clip of each weight range; the search must round in the same way.
    clip: bool = False
    # Distance of the alphas that are tried, from 0 to 1. The paper's is 0.05; 0.1 costs half as much.
    step: float = 0.1
    # How many calibration batches give the loss of the finalists; candidates are ranked on the first.
    batches: int = 4
    # Whether the first output holds logits [.., V]: the loss is then their divergence, else the squared error.
    logits: bool = True

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
        ["SmoothQuantPlus and SmoothQuant do the same twice. Fix: drop SmoothQuant"]
        * any(isinstance(p, SmoothQuant) for p in passes)
        + rounding_conflicts(config, passes)
    ),
)
def smoothquant_plus(program: Program, config: SmoothQuantPlus, context: PassContext) -> PassReport:
    """Search alpha on quantized copies, then smooth the program with the winner, in place."""
    mask = TokenMask(program)
    data = [batch for _, batch in zip(range(config.batches), context.data(), strict=False)]
    tokens = [mask.of(batch, number) for number, batch in enumerate(data, 1)]
    expected = [first_output(program, batch) for batch in data]
    coarse = dataclasses.replace(config, clip=False)
    ranked = context.figures_of(
        candidates(config),
        lambda candidate: loss_of(program, coarse, context, candidate, data[:1], expected[:1], tokens[:1]),
        "SmoothQuant+",
    )
    finalists: list[SmoothQuant | None] = [None, *sorted(ranked, key=ranked.__getitem__)[:_FINALISTS]]
    losses = context.figures_of(
        finalists,
        lambda candidate: loss_of(program, config, context, candidate, data, expected, tokens),
        "SmoothQuant+, the best",
    )
    best = min(losses, key=losses.__getitem__)
    report = PassReport("SmoothQuantPlus")
    if best is not None:
        report = dataclasses.replace(smoothquant(program, best, context), name="SmoothQuantPlus")
    report.notes.append(f"{describe(best)}: loss {losses[best]:.4g}, without smoothing {losses[None]:.4g}")
    report.notes += mask.notes()
    return report


def candidates(config: SmoothQuantPlus) -> list[SmoothQuant]:
    """Every strength, everywhere and in either kind of place alone."""
    grid = [min(1.0, i * config.step) for i in range(round(1 / config.step) + 1)]
    return [SmoothQuant(alpha, *where) for where in ((True, True), (True, False), (False, True)) for alpha in grid]


def describe(candidate: SmoothQuant | None) -> str:
    """A candidate as the report names it."""
    if candidate is None:
        return "no smoothing"
    where = (
        "" if candidate.norms and candidate.rows else f" behind {'norms' if candidate.norms else 'linear rows'} only"
    )
    return f"alpha {candidate.alpha:.2f}{where}"


def loss_of(
    program: Program,
    config: SmoothQuantPlus,
    context: PassContext,
    candidate: SmoothQuant | None,
    data: list[Sequence[Any]],
    expected: list[Tensor],
    tokens: list[BatchTokens],
) -> float:
    """Mean divergence from the float model after smoothing as a candidate does and rounding all weights.

    Args:
        program: the float program, not changed.
        config: the weight format and the loss.
        context: of the program, with the absmax of the inputs.
        candidate: how to smooth; None: not at all.
        data: flat inputs of each batch.
        expected: the first output of the float program for each batch.
        tokens: of each batch; padding does not count.
    """
    tried = program.copy()
    if candidate is not None:
        smoothquant(tried, candidate, context.on(tried))
    weights_only = Quantize(config.weight, None, clip=config.clip)
    round_to_nearest(tried, weights_only, context.on(tried, keep_float_weights=False))
    tried.cleanup()
    measure = kl_divergence if config.logits else relative_squared_error
    output, total = program.outputs[0], 0.0
    for batch, value, own in zip(data, expected, tokens, strict=True):
        total += float(measure(own.select(output, value), own.select(output, first_output(tried, batch))))
    return total / len(data)


def first_output(program: Program, batch: Sequence[Any]) -> Tensor:
    """Logits, or the output of an encoder. (Not a hidden value: smoothing rescales those on purpose.)"""
    found: Tensor = program(*batch)[0]
    return found
