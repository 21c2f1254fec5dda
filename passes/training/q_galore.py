"""QGaLore: every linear weight in int8, trained through a low-rank parameter that is zero between the steps.

Source: Q-GaLore (arXiv:2407.08296); GaLore (arXiv:2403.03507), which it is with `weight=None, basis=None, factor=1`.
Law:    the gradient of L is the projected gradient of the weight, (g^T x) P^T = g^T (x P^T), and the fold of an
        optimizer's step on L = 0 is its step in the basis P.
Keeps:  nothing exactly: the weights are rounded to int8.
Needs:  nothing.
Skips:  what gives the output (logits), weights that something else reads too, frozen weights, stacks of experts,
        weights with a side smaller than the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.analysis.sites import Site
from qcompile.ir.node_meta import LOW_RANK_STEP, MODULE, SITE
from qcompile.ir.op_calls import LowRankLinearCall
from qcompile.ir.program import Program
from qcompile.numerics.code_update import takes_updates
from qcompile.numerics.format import Format
from qcompile.numerics.low_rank import is_left
from qcompile.numerics.qtensor import StoredParts
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.site_plan import writes_output
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class QGaLore(PassConfig):
    """Train all linear weights but the logits' in a low-rank basis of their gradients."""

    # Vectors of a basis. The paper: 128 for 60M parameters, 256 for 130M, 1024 for 7B.
    rank: int = 128
    # Optimizer steps between two bases, at the start. The paper: 200, and 500 for 7B.
    gap: int = 200
    # What an optimizer's step in the basis is multiplied by.
    scale: float = 0.25
    # Format of the weights; None keeps them float, as in GaLore.
    weight: Format | None = Format("int8", "group", 256, "int")
    # Format of the bases; None keeps them float, as in GaLore.
    basis: Format | None = Format("int4", "group", 256, "int")
    # Mean |cos| between the first vectors of consecutive bases from which on the interval is multiplied.
    similarity: float = 0.4
    # What the interval is multiplied by; 1 keeps it.
    factor: int = 2
    # Over how many bases the mean is taken.
    queue: int = 5
    # How the weights are rounded after a step. To nearest loses every step far below the scale.
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    # Of the random values of stochastic rounding.
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rank", 1), ("gap", 1), ("factor", 1), ("queue", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise RecipeError(f"QGaLore: {name} is {value!r}. Fix: an integer, at least {least}")
        if not 0 < self.scale < float("inf"):
            raise RecipeError(f"QGaLore: scale is {self.scale!r}. Fix: a positive factor, as 0.25")
        if not 0 <= self.similarity <= 1:
            raise RecipeError(f"QGaLore: similarity is {self.similarity!r}. Fix: a mean |cos|, from 0 to 1")
        if self.rounding not in ("stochastic", "nearest"):
            raise RecipeError(f"QGaLore: rounding is {self.rounding!r}. Fix: 'stochastic' or 'nearest'")
        _check_weight_format(self.weight, "weight")
        if self.basis is not None and (self.basis.two_level or self.basis.smooth or self.basis.per == "tensor"):
            raise RecipeError(
                f"QGaLore: a basis cannot be stored as {self.basis}. Fix: groups with one level of scales, as "
                "int4/group256/zero"
            )


@rewrites(QGaLore, Stage.QUANTIZE, exact=False, trains=True)
def q_galore(program: Program, config: QGaLore, context: PassContext) -> PassReport:
    """Replace the products by ones that train, in place.

    Raises:
        RecipeError: a rule with a format that cannot be; no site is left.
    """
    report = PassReport("QGaLore")
    chosen = [site for site in context.facts.sites if _is_chosen(site, config, context, report)]
    formats = {site.name: _format_of(site, config, context) for site in chosen}
    names = list(dict.fromkeys(site.name for site in chosen))
    for site in chosen:
        _insert(program, site, config, formats[site.name], names.index(site.name), context)
    report.done += names
    if not names:
        reasons = "; ".join(str(item) for item in report.skipped[:8]) or "the model has no linear"
        raise RecipeError(f"QGaLore trains no weight: {reasons}")
    return report


def _is_chosen(site: Site, config: QGaLore, context: PassContext, report: PassReport) -> bool:
    sites = [other for other in context.facts.sites if other.weight is site.weight]
    rule = context.rules.get(site.name)
    module = site.node.meta.get(MODULE)
    obstacle = context.keep_float.get(site.name)
    if obstacle is None and rule is not None and rule.keep:
        obstacle = f"kept float by the rule {rule.match!r}"
    if obstacle is None and site.kind != "linear":
        obstacle = "a stack of experts is trained as it is"
    if obstacle is None:
        others = set(site.weight.users) - {s.node for s in sites if s.node.meta.get(MODULE) == module}
        if others:
            obstacle = f"its weight is tied: {min(node.name for node in others)} reads it too"
    if obstacle is None and any(writes_output(other) for other in sites):
        obstacle = "it gives the output"
    if obstacle is None and config.rank > min(site.N, site.K):
        fix = f"QGaLore(rank={min(site.N, site.K)}) or smaller"
        obstacle = f"rank {config.rank} is larger than a side of its weight. Fix: {fix}"
    if obstacle is not None:
        context.skip(report, site.name, obstacle, site.node.name)
    return obstacle is None


def _format_of(site: Site, config: QGaLore, context: PassContext) -> Format | None:
    rule = context.rules.get(site.name)
    if rule is None:
        return config.weight
    if rule.act is not None:
        raise RecipeError(f"rule {rule.match!r} has act={rule.act}, but QGaLore keeps activations float. Fix: drop it")
    _check_weight_format(rule.weight, f"weight, by the rule {rule.match!r},")
    return rule.weight or config.weight


def _check_weight_format(format: Format | None, what: str) -> None:
    if format is not None and (format.dtype != "int8" or not takes_updates(format)):
        raise RecipeError(
            f"QGaLore: {what} is {format}. Fix: int8 with scales for groups or rows, as int8/group256/zero; "
            "or None, which keeps weights float"
        )


def _insert(
    program: Program, site: Site, config: QGaLore, format: Format | None, index: int, context: PassContext
) -> None:
    """One product; a module that is called again reads what was added for its first call."""
    weight = program.weights[site.name]
    codes, scale, zero = weight.clone(), None, None
    if format is not None:
        codes, scale, zero, _ = _quantized(site.name, weight, format)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left = is_left(site.N, site.K)
    length = site.N if left else site.K
    vectors = torch.zeros(config.rank, length, dtype=wide, device=weight.device)
    basis, basis_scale, basis_zero = vectors, None, None
    if config.basis is not None:
        basis, basis_scale, basis_zero, _ = quantize_tensor(vectors, config.basis).stored_parts
    tensors = {
        "codes": codes,
        "scale": scale,
        "zero": zero,
        "low": vectors.new_zeros((config.rank, site.K) if left else (site.N, config.rank)),
        "basis": basis,
        "basis_scale": basis_scale,
        "basis_zero": basis_zero,
        "first": vectors.new_zeros(length),
        "similarities": vectors.new_zeros(config.queue, dtype=torch.float32),
        "schedule": torch.tensor([0, config.gap, 0, 1], device=weight.device),
    }
    nodes = {name: _part(program, f"{site.name}.{name}", tensor) for name, tensor in tensors.items()}
    call = LowRankLinearCall(
        x=_given(site.node.args[0]),  # as it is now: the product before may have been replaced
        weight=_given(nodes["codes"]),
        scale=nodes["scale"],
        zero=nodes["zero"],
        low=_given(nodes["low"]),
        bias=site.bias,
        basis=_given(nodes["basis"]),
        basis_scale=nodes["basis_scale"],
        basis_zero=nodes["basis_zero"],
        first=_given(nodes["first"]),
        similarities=_given(nodes["similarities"]),
        schedule=_given(nodes["schedule"]),
        format="" if format is None else str(format),
        basis_format="" if config.basis is None else str(config.basis),
        threshold=config.similarity,
        factor=config.factor,
        dtype=site.node.meta["val"].dtype,
    )
    product = call.insert(program, before=site.node)
    product.meta.update({MODULE: site.node.meta[MODULE], SITE: site.name})
    product.meta[LOW_RANK_STEP] = (config.scale, config.rounding == "stochastic", config.seed * 1_000_003 + index)
    program.replace(site.node, product)
    if site.name in context.sites and format is not None:
        stored = sum(part.nbytes for part in (codes, scale, zero) if part is not None)
        context.sites[site.name].set_quantized(format, None, stored)
    elif site.name in context.sites:
        context.sites[site.name].reason = "its weight is trained in float, in a low-rank basis"


def _quantized(name: str, weight: Tensor, format: Format) -> StoredParts:
    try:
        return quantize_tensor(weight, format).stored_parts
    except ValueError as error:
        raise RecipeError(f"QGaLore: the weight {name} cannot be quantized to {format}: {error}") from error


def _part(program: Program, name: str, tensor: Tensor | None) -> fx.Node | None:
    if tensor is None:
        return None
    return program.node_of(name) if name in program.weights else program.add_weight(name, tensor)


def _given(node: object) -> fx.Node:
    assert isinstance(node, fx.Node)
    return node
