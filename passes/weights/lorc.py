"""LoRC: a low-rank correction beside a quantized weight.

Source: Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302 sec. 5.
Law:    E = W - W^ = U S V^T;  x W^^T + (x V'^T) U'^T with V' = sqrt(S_m) V_m^T, U' = U_m sqrt(S_m).
        By Eckart and Young ||E - U' V'||_F^2 = sum of the squares of the dropped singular values:
        no correction of rank m is better, none is worse than no correction, full rank restores W.
        In int8, rounding the factors (a scale for each row) adds at most 1/127 of each of them.
        It costs 16 m (N + K) / (N K) bits a weight, in int8 half of it.
Needs:  nothing but a quantizing pass before it, of any kind.
Skips:  sites that are float.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ir.aten_ops import LINEAR, aten
from qcompile.ir.node_meta import FLOAT_WEIGHT, LOW_RANK, SITE
from qcompile.ir.program import Program
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.insert_qdq import corrected_sites, float_input
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class LoRC(PassConfig):
    """The rank of the correction and how its factors are stored."""

    # The paper's m. It finds 8 enough, and 4 to 32 alike.
    rank: int = 8
    # Format of U' and V': None for the model's dtype, or int8 for half of the bytes.
    factors: Format | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"LoRC: rank must be at least 1, got {self.rank}")
        super().__post_init__()
        if self.factors not in (None, Format("int8")):
            raise RecipeError(f"LoRC: factors are int8 or None for the model's dtype, got {self.factors}")


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best correction of a rank: E [N, K] -> V' [m, K], U' [N, m] with E ~ U' V', float32.

    By the eigenvectors of the smaller Gram matrix in float64, which costs a tenth of an SVD.
    """
    e = error.double()
    tall = e.shape[0] >= e.shape[1]
    gram = e.t() @ e if tall else e @ e.t()
    values, vectors = torch.linalg.eigh(gram)
    rank = min(rank, len(values))
    root = values[-rank:].clamp_min(0).sqrt()
    vectors = vectors[:, -rank:]
    balance = root.sqrt()  # both factors of one size, so that neither over- nor underflows
    inverse = torch.where(balance > 0, 1 / balance, torch.zeros_like(balance))
    if tall:  # E V = U S
        right, left = vectors * balance, (e @ vectors) * inverse
    else:
        left, right = vectors * balance, (e.t() @ vectors) * inverse
    return right.t().float().contiguous(), left.float().contiguous()


@rewrites(LoRC, Stage.CORRECT, exact=False, requires=(Quantize,), reads_float_weights=True)
def lorc(program: Program, config: LoRC, context: PassContext) -> PassReport:
    """Add a correction beside every quantized site, in place."""
    report = PassReport("LoRC")
    bits = weights = 0
    for node, original, dequantized in corrected_sites(program):
        name = node.meta[SITE]
        inner, outer = low_rank(original.float() - dequantized.float(), config.rank)
        x = float_input(node)
        stored: dict[str, str] = {}  # part -> weight
        for part, factor in (("low_in", inner), ("low_out", outer)):
            weight = _add_factor(program, node, part, factor, config, stored)
            x = program.insert(LINEAR, (x, weight), before=node)
        total = program.insert(aten.add.Tensor, (node, x), after=node)
        program.replace(node, total)
        node.meta[LOW_RANK] = stored
        added = sum(program.weights[weight].nbytes for weight in stored.values())
        if name in context.sites:
            context.sites[name].bytes_after += added
        bits += 8 * added
        weights += original.numel()
        report.done.append(name)
    report.notes.append(f"rank {config.rank}: {bits / max(weights, 1):.3f} bits a weight")
    return report


def _add_factor(
    program: Program, node: torch.fx.Node, part: str, factor: Tensor, config: LoRC, stored: dict[str, str]
) -> torch.fx.Node:
    """Add a factor as weight "<site>.<part>", in int8 with "<site>.<part>_scale"; both are entered in `stored`."""
    name, dtype = f"{node.meta[SITE]}.{part}", node.meta[FLOAT_WEIGHT].dtype
    stored[part] = name
    if config.factors is None:
        return program.add_weight(name, factor.to(dtype))
    q = quantize_tensor(factor, config.factors)
    stored[f"{part}_scale"] = f"{name}_scale"
    nodes = program.add_weight(name, q.codes), program.add_weight(f"{name}_scale", q.scale)
    factor_node: torch.fx.Node = program.inline(
        lambda codes, scale: (codes.float() * scale).to(dtype), nodes, before=node
    )
    return factor_node
