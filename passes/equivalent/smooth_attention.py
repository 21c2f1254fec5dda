"""SmoothAttention: move the outlier channels of keys, which a 4-bit cache cannot hold, into the queries.

Source: Lin et al. 2024, QServe (QoQ), arXiv:2405.04532 sec. 4.2.
Law:    lambda = max|K|^alpha for each class of rows that meet in the scores (a rotary pair, grouped
        heads; see qcompile/analysis/attention_scores.py);  (lambda q)(k / lambda)^T = q k^T.
        Rows and biases of the query linear are multiplied, those of the key linear divided.
Keeps:  the output.   Needs: absmax of the keys after the rotary embedding, [heads, D].
Leaves: attentions whose queries or keys pass a norm: it would take the factor out again.
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

    alpha: float = 0.5  # 0: none, 1: all

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"SmoothAttention: alpha must be between 0 and 1, got {self.alpha}")


def key_scale(absmax: Tensor, flow: AttentionScores, alpha: float) -> Tensor:
    """max|K| [heads, D] -> lambda of each row of the makers, float64; 1 for rows that take no part."""
    count = len(flow.classes)
    peak = torch.zeros(count, dtype=torch.float64)
    peak = peak.scatter_reduce(0, flow.of_key.flatten(), absmax.double().flatten(), "amax")
    scale = torch.where(peak > 0, peak.clamp_min(1e-5) ** alpha, torch.ones_like(peak))
    return torch.where(flow.classes >= 0, scale[flow.classes.clamp_min(0)], torch.ones_like(scale))


@rewrites(SmoothAttention, Stage.SMOOTH, exact=True, needs=("keys",))
def smooth_attention(program: Program, config: SmoothAttention, context: PassContext) -> PassReport:
    """Smooth the keys of every attention whose rows can be followed, in place."""
    report = PassReport("SmoothAttention")
    for flow in scores(program, context.facts.sites):
        if isinstance(flow, Obstacle):
            report.skip("attention", flow.reason, flow.node)
            continue
        scale = key_scale(context.statistics.keys[flow.keys.name], flow, config.alpha)
        factor = torch.where(flow.query, scale, 1 / scale)
        for producer, start in flow.producers:
            by_row = factor[start : start + producer.N]
            names = [producer.name] + [n for n in [program.weight_name(producer.bias)] if n is not None]
            for name in names:
                old = program.weights[name]
                scaled = old.double() * (by_row[:, None] if old.ndim == 2 else by_row).to(old.device)
                program.weights[name] = scaled.to(old.dtype)
            report.done.append(producer.name)
        report.changed |= flow.between
    return report
