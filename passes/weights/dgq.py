"""DGQ: the two levels of a dual int4 weight, searched so that the site's output changes least.

Source: Zhang et al. 2023, arXiv:2310.04836 sec. 3.2 (two-phase grid search).
Law:    w ~ s0 s1 (q - z) with |s1 (q - z)| <= 127. Phase 1 finds for each group the scale among 20
        that minimizes the error of the group's share of the output, e H_gg e^T; phase 2 finds for
        each row the s0 among 80 whose integers s1 = round(scale / s0) lose least, e H e^T over
        the whole row. The plain dual rounding (qcompile/numerics/two_level.py) is a candidate too: never
        worse than it.
Needs:  the site's inputs, sequentially.
Skips:  what Quantize skips.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor, expand_groups, group_columns, ungroup_columns
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.weights.choice import Choice
from qcompile.passes.weights.gptq import GPTQ, compensate, loss
from qcompile.passes.weights.sequential import quantize_sequentially
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError

GROUP_STEPS, ROW_STEPS = 20, 80
"""Scales tried for a group and for a row, as in the paper's code: 1.009 .. 0.80 and 1.01 .. 0.20 of the range."""


@dataclass(frozen=True)
class DGQ(GPTQ):
    """Quantize to a dual format on searched scales; fields of GPTQ matter for `codes` "gptq"."""

    # A dual format: int8 scales of groups beside a float scale of each row.
    weight: Format = Format.parse("int4/group128/zero/dual")
    # "nearest" rounds to nearest on the searched scales, as the paper does; "gptq" chooses codes on them by GPTQ.
    codes: str = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight.dual or self.weight.zero == "none":
            raise RecipeError(f"DGQ: the weight must be dual, as int4/group128/zero/dual, got {self.weight}")
        if self.codes not in ("nearest", "gptq"):
            raise RecipeError(f"DGQ: codes must be 'nearest' or 'gptq', got {self.codes!r}")


def search_groups(weight: Tensor, hessian: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Phase 1: scale and integer zero point of each group, float32 [N, groups].

    Args:
        weight: [N, K].
        hessian: [K, K].
        form: the dual format.
    """
    groups = group_columns(weight.float(), form)  # [N, groups, G]
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    width = (high - low).clamp_min(1e-20)
    zero = (-low / width * 15).round().clamp(0, 15)
    group = form.width(weight.shape[1])
    pad = -weight.shape[1] % group
    padded = torch.nn.functional.pad(hessian.float(), (0, pad, 0, pad)).unflatten(0, (-1, group))
    blocks = torch.stack([part[:, i * group : (i + 1) * group] for i, part in enumerate(padded)])
    scale, best = width / 15, torch.full_like(width, torch.inf)
    for step in range(1, GROUP_STEPS + 1):
        tried = width * (1.02 - 0.22 * step / GROUP_STEPS) / 15
        codes = ((groups / tried[..., None]).round() + zero[..., None]).clamp(0, 15)
        error = ((codes - zero[..., None]) * tried[..., None] - groups).transpose(0, 1)  # [groups, N, G]
        lost = ((error @ blocks) * error).sum(-1).t()
        better = lost < best
        best, scale = torch.where(better, lost, best), torch.where(better, tried, scale)
    return scale, zero


def search_rows(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, form: Format) -> QTensor:
    """Phase 2: the scale of each row, integer group scales, and codes rounded to nearest on them.

    Args:
        weight: [N, K].
        hessian: [K, K].
        scale: of phase 1, [N, groups].
        zero: of phase 1, [N, groups].
        form: the dual format.
    """
    wide, h = weight.float(), hessian.float()
    peak = wide.abs().amax(-1, keepdim=True)
    best, plain = quantize_tensor(wide, form, clip=True), quantize_tensor(wide, form)
    lost, of_plain = (loss(wide, q.dequantize(), hessian).float() for q in (best, plain))
    for old, new in zip(_parts(best), _parts(plain), strict=True):
        old[of_plain < lost] = new[of_plain < lost]
    lost = torch.minimum(lost, of_plain)
    for step in range(1, ROW_STEPS + 1):  # of a row of zeros all are NaN, and none is better
        row = peak * (1.02 - 0.82 * step / ROW_STEPS) / 127
        group_scale = (scale / row).round().clamp(1, 127)
        max_value = (127 / group_scale).floor()
        codes = group_columns(wide / row, form).div_(group_scale[..., None]).round_().add_(zero[..., None])
        codes.clamp_((zero - max_value).clamp_min(0)[..., None], (zero + max_value).clamp_max(15)[..., None])
        flat = ungroup_columns(codes, wide.shape[1])
        error = (flat - expand_groups(zero, form, wide.shape[1])) * expand_groups(
            group_scale, form, wide.shape[1]
        ) * row - wide
        now = ((error @ h) * error).sum(-1)
        better = now < lost
        lost = torch.where(better, now, lost)
        for old, new in zip(_parts(best), (flat, row, zero, group_scale), strict=True):
            old[better] = new[better].to(old.dtype)
    return best


def _parts(q: QTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert q.zero is not None and q.group_scale is not None
    return q.codes, q.scale, q.zero, q.group_scale


@rewrites(DGQ, Stage.QUANTIZE, exact=False, needs=("batches",))
def dgq(program: Program, config: DGQ, context: PassContext) -> PassReport:
    """Quantize every planned site on searched scales, in the order of the graph."""

    def choose(weight: Tensor, hessian: Tensor, form: Format) -> Choice:
        if not form.dual or form.zero == "none":  # a rule's own format
            grid = quantize_tensor(weight, form, clip=True)
        else:
            grid = search_rows(weight, hessian, *search_groups(weight, hessian, form), form)
        return compensate(weight, hessian, grid, config) if config.codes == "gptq" else Choice(grid)

    return quantize_sequentially(program, config, context, PassReport("DGQ"), choose)
