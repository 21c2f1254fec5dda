"""GPTAQ: GPTQ towards what the float model computes, not towards the weights alone.

Source: Li et al. 2025, arXiv:2504.02692 ("asymmetric calibration"), eq. 4. The closed form below is
        derived here: with X~ the float model's inputs of a site, X those that the quantized model gives
        it (rounded, where activations are), H = X X^T and C = X~ X^T,

            |W X~ - Q X|^2 = |(W* - Q) X|^2 + what Q cannot change,    W* = W + W (C - H) H^-1,

        so that GPTQ on W* minimizes the left side. The paper instead corrects column by column, and lets every
        token count by its size; here each is divided by the root mean square of its float input.
Law:    with X = X~, W* is W: GPTQ with tokens that count alike. tr((W* - Q) H (W* - Q)^T) is not worse than
        round-to-nearest's of W* on the same grid.
Needs:  the site's inputs, of the quantized model and of the float one: twice GPTQ's memory for values.
Skips:  what GPTQ skips. Stacks of experts, whose rows differ once routing does, are quantized by GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.passes.weights.choice import Choice
from qcompile.passes.weights.gptq import GPTQ, compensate, grid_of
from qcompile.passes.weights.sequential import quantize_sequentially
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Quantize with GPTAQ; all other fields as for GPTQ."""

    # Share of the step from W to W* that is taken, 0 to 1. At 0 this is GPTQ with tokens that count alike.
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise RecipeError(f"GPTAQ: strength must be between 0 and 1, got {self.strength}")


def towards_float(weight: Tensor, hessian: Tensor, cross: Tensor, damp_percent: float, strength: float = 1.0) -> Tensor:
    """W + strength W (C - H) (H + damp_percent mean(diag H) I)^-1, in the dtype of `weight`.

    Args:
        weight: [N, K].
        hessian: H = X X^T of the quantized model's inputs, [K, K].
        cross: C = X~ X^T, the float model's inputs by the quantized model's, [K, K].
        damp_percent: as for GPTQ.
        strength: as in the config.
    """
    h = hessian.double()
    ridge = h.diagonal().mean().clamp_min(1e-30) * damp_percent
    h = h + ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
    step: Tensor = torch.linalg.solve(h, (cross - hessian).double().t()).t()  # H is symmetric
    return (weight.double() + strength * (weight.double() @ step)).to(weight.dtype)


@rewrites(GPTAQ, Stage.QUANTIZE, exact=False, needs=("batches",))
def gptaq(program: Program, config: GPTAQ, context: PassContext) -> PassReport:
    """Quantize every planned site, in the order of the graph, towards the float model's output."""

    def choose(weight: Tensor, hessian: Tensor, form: Format) -> Choice:
        return compensate(weight, hessian, grid_of(weight, hessian, form, config), config)

    def aim(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
        return towards_float(weight, hessian, cross, config.damp_percent, config.strength)

    return quantize_sequentially(program, config, context, PassReport("GPTAQ"), choose, aim)
