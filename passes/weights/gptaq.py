"""GPTAQ: GPTQ towards what the float model computes, not towards the weights alone.

Source: Li et al. 2025, arXiv:2504.02692 ("asymmetric calibration"), eq. 4. The closed form below is
        derived here: with X~ the float model's inputs of a site, X those that the quantized model gives
        it (rounded, where activations are), H = X X^T and C = X~ X^T,

            |W X~ - Q X|^2 = |(W* - Q) X|^2 + what Q cannot change,    W* = W + W (C - H) H^-1,

        so that GPTQ on W* minimises the left side. The paper instead corrects column by column, and lets every
        token count by its size; here each is divided by the root mean square of its float input.
Law:    with X = X~, W* is W: GPTQ with tokens that count alike. tr((W* - Q) H (W* - Q)^T) is not worse than
        round-to-nearest's of W* on the same grid.
Needs:  the site's inputs, of the quantized model and of the float one: twice GPTQ's memory for values.
Leaves: what GPTQ leaves. Stacks of experts, whose rows differ once routing does, are done by GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.weights.gptq import GPTQ, compensate
from qcompile.passes.weights.sequential import quantize_sequentially
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Quantize with GPTAQ; formats, output, clip, damping, order and block as for GPTQ."""

    strength: float = 1.0  # of the step from W to W*

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise RecipeError(f"GPTAQ: strength must be between 0 and 1, got {self.strength}")


def towards_float(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float, strength: float = 1.0) -> Tensor:
    """W + strength W (C - H) (H + damping mean(diag H) I)^-1, in the dtype of `weight`.

    Args:
        weight: [N, K]. hessian: X X^T. cross: X~ X^T, float inputs by quantized ones; [K, K].
    """
    h = hessian.double()
    ridge = h.diagonal().mean().clamp_min(1e-30) * damping
    h = h + ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
    step = torch.linalg.solve(h, (cross - hessian).double().t()).t()  # H is symmetric
    return (weight.double() + strength * (weight.double() @ step)).to(weight.dtype)


@rewrites(GPTAQ, Stage.QUANTIZE, exact=False, needs=("batches",))
def gptaq(program: Program, config: GPTAQ, context: PassContext) -> PassReport:
    """Quantize every wanted site, in the order of the graph, towards the float model's output."""
    nearest: list[str] = []

    def choose(weight: Tensor, hessian: Tensor, form: Format, names: list[str]) -> QTensor:
        return compensate(weight, hessian, quantize_tensor(weight, form, clip=config.clip), config, names, nearest)

    def aim(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
        return towards_float(weight, hessian, cross, config.damp_percent, config.strength)

    report = quantize_sequentially(program, config, context, PassReport("GPTAQ"), choose, aim)
    if nearest:
        report.notes.append(f"singular Hessian, rounded to nearest: {', '.join(nearest)}")
    return report
