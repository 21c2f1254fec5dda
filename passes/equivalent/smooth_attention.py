"""SmoothAttention: move the outlier channels of keys, which a 4-bit cache cannot hold, into the queries.

Source: Lin et al. 2024, QServe (QoQ), arXiv:2405.04532 sec. 4.2.
Law:    lambda = max|K|^alpha for each class of rows that meet in the scores (a rotary pair, grouped
        heads; see qcompile/analysis/attention_scores.py);  (lambda q)(k / lambda)^T = q k^T.
        Rows and biases of the query linear are multiplied, those of the key linear divided.
Keeps:  the output.
Needs:  absmax of the keys behind the rotary embedding, [H, D].
Skips:  attentions whose queries or keys pass a norm: it would take the factor out again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.analysis.attention_scores import AttentionScores, scores
from qcompile.analysis.obstacle import Obstacle
from qcompile.ir.program import Program
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class SmoothAttention(PassConfig):
    """How much of the keys' unevenness moves into the queries."""

    # The paper's alpha, 0 to 1: at 0 keys stay as they are, at 1 all their channels get one absmax.
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"SmoothAttention: alpha must be between 0 and 1, got {self.alpha}")


def key_scale(absmax: Tensor, attention: AttentionScores, alpha: float) -> Tensor:
    """max|K| [H, D] -> lambda of each row of the producers, float64; 1 for rows that take no part."""
    count = len(attention.classes)
    peak = torch.zeros(count, dtype=torch.float64)
    peak = peak.scatter_reduce(0, attention.of_key.flatten(), absmax.double().flatten(), "amax")
    scale = torch.where(peak > 0, peak.clamp_min(1e-5) ** alpha, torch.ones_like(peak))
    return torch.where(attention.classes >= 0, scale[attention.classes.clamp_min(0)], torch.ones_like(scale))


@rewrites(SmoothAttention, Stage.SMOOTH, exact=True, needs=("keys",))
def smooth_attention(program: Program, config: SmoothAttention, context: PassContext) -> PassReport:
    """Smooth the keys of every attention whose rows can be followed, in place."""
    report = PassReport("SmoothAttention")
    for attention in scores(program, context.facts.sites):
        if isinstance(attention, Obstacle):
            report.skip("attention", attention.reason, attention.node)
            continue
        scale = key_scale(context.statistics.keys[attention.keys.name], attention, config.alpha)
        factor = torch.where(attention.query, scale, 1 / scale)
        for producer, start in attention.producers:
            by_row = factor[start : start + producer.N]
            names = [producer.name] + [n for n in [program.weight_name(producer.bias)] if n is not None]
            for name in names:
                old = program.weights[name]
                scaled = old.double() * (by_row[:, None] if old.ndim == 2 else by_row).to(old.device)
                program.weights[name] = scaled.to(old.dtype)
            report.done.append(producer.name)
        report.changed |= attention.between
    return report
