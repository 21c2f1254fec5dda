"""QALoRA: a group-pooled low-rank adapter beside every product with a weight that is quantized in groups.

A stack of experts has an adapter for each expert, beside the weights: the model multiplies them itself.

Source: QA-LoRA, arXiv:2309.14717 sec. 3.3, alg. 1. A [r, K/G] is drawn (Xavier uniform, as in the authors' code), B is
        zero.
Law:    qlinear(x) + c pool(x) A^T B^T = qlinear(x) with zero points z - (c/G) (B A) / s (numerics/zero_shift.py).
Keeps:  the output, bit for bit: B = 0.
Needs:  a model that was quantized in groups.
Skips:  formats whose zero points cannot move (one scale a row, two-level, float codes), activations with runtime
        smoothing, what gives the output, weights with a side smaller than the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.network_ends import is_last
from qcompile.ir.aten_ops import aten
from qcompile.ir.node_meta import MODULE
from qcompile.ir.op_calls import DequantizeCall, GroupAdapterCall, QLinearCall, StackAdapterCall, site_name
from qcompile.ir.program import Program
from qcompile.ir.quantized_stacks import quantized_stacks, stack_site
from qcompile.numerics.format import Format
from qcompile.numerics.zero_shift import shift_obstacle
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class QALoRA(PassConfig):
    """Add adapters.

    Attributes:
        rank: r, the rows of A and columns of B.
        alpha: the adapter's output is scaled by alpha / rank.
        seed: of the draws of A.
    """

    rank: int = 16
    alpha: float = 32.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"QALoRA: rank is {self.rank}. Fix: at least 1")
        if not self.alpha > 0:
            raise RecipeError(f"QALoRA: alpha is {self.alpha}. Fix: a positive number, as twice the rank")


@rewrites(QALoRA, Stage.CORRECT, exact=True, trains=True)
def qa_lora(program: Program, config: QALoRA, context: PassContext) -> PassReport:
    """Add adapters to the graph, in place.

    Raises:
        RecipeError: no product can have an adapter.
    """
    report = PassReport("QALoRA")
    chosen = [(n, c) for n, c in QLinearCall.find(program) if _is_chosen(program, n, c, config, context, report)]
    stacks = [found for found in quantized_stacks(program) if _is_stack_chosen(*found, config, context, report)]
    names = list(dict.fromkeys(site_name(program, node) for node, _ in chosen))
    paths = list(dict.fromkeys(path for *_, path in stacks))
    for node, call in chosen:
        name = site_name(program, node)
        _insert(program, node, call, config, name, names.index(name))
    for found, stack, path in stacks:
        _insert_stack(program, found, stack, config, path, len(names) + paths.index(path))
    names += [stack_site(path) for path in paths]
    report.done += names
    if not names:
        reasons = "; ".join(str(item) for item in report.skipped[:8]) or "the model has no quantized product"
        fix = "Fix: qcompile.quantize(model, 'w4a16-g32') first, which quantizes in groups"
        raise RecipeError(f"QALoRA adapts no product: {reasons}" + ("" if "Fix:" in reasons else f". {fix}"))
    return report


def _is_chosen(
    program: Program, node: fx.Node, call: QLinearCall, config: QALoRA, context: PassContext, report: PassReport
) -> bool:
    name = site_name(program, node)
    rule = context.rules.get(name)
    obstacle = shift_obstacle(call.weight_format)
    if obstacle is None and call.act_format is not None and call.act_format.smooth:
        obstacle = "its activations are smoothed at run time, and the adapter would not be"
    if obstacle is None and rule is not None and rule.keep:
        obstacle = f"kept as it is by the rule {rule.match!r}"
    if obstacle is None and is_last(node):
        obstacle = "it gives the output"
    side = min(int(node.meta["val"].shape[-1]), call.columns)
    if obstacle is None and config.rank > side:
        obstacle = f"rank {config.rank} is larger than a side of its weight. Fix: rank={side} or smaller"
    if obstacle is not None:
        report.skip(name, obstacle, node.name)
    return obstacle is None


def _is_stack_chosen(
    node: fx.Node, call: DequantizeCall, path: str, config: QALoRA, context: PassContext, report: PassReport
) -> bool:
    name = stack_site(path)
    rule = context.rules.get(name)
    obstacle = shift_obstacle(Format.parse(call.format))
    if obstacle is None and rule is not None and rule.keep:
        obstacle = f"kept as it is by the rule {rule.match!r}"
    side = min(node.meta["val"].shape[1:])
    if obstacle is None and config.rank > side:
        obstacle = f"rank {config.rank} is larger than a side of its weights. Fix: rank={side} or smaller"
    if obstacle is not None:
        report.skip(name, obstacle, node.name)
    return obstacle is None


def _insert(program: Program, node: fx.Node, call: QLinearCall, config: QALoRA, name: str, index: int) -> None:
    columns, rows = call.columns, int(node.meta["val"].shape[-1])
    form = call.weight_format
    if f"{name}.lora_a" in program.weights:
        a, b = program.node_of(f"{name}.lora_a"), program.node_of(f"{name}.lora_b")
    else:
        device = program.weight_of(call.weight).device
        b = program.add_weight(f"{name}.lora_b", torch.zeros(rows, config.rank, device=device))
        a = program.add_weight(f"{name}.lora_a", _drawn(config, form.groups(columns), index).to(device))
    x = call.x
    if call.act:
        assert call.x_scale is not None
        values = DequantizeCall(x, call.x_scale, call.x_zero, None, call.act, 0, call.dtype)
        x = values.insert(program, after=node)
    after = x if call.act else node
    adapter = GroupAdapterCall(x, a, b, form.width(columns), config.alpha / config.rank).insert(program, after=after)
    adapter.meta[MODULE] = name
    total = program.insert(aten.add.Tensor, (node, adapter), after=adapter)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _insert_stack(program: Program, node: fx.Node, call: DequantizeCall, config: QALoRA, path: str, index: int) -> None:
    experts, rows, _ = node.meta["val"].shape
    form = Format.parse(call.format)
    if f"{path}.lora_a" in program.weights:
        a, b = program.node_of(f"{path}.lora_a"), program.node_of(f"{path}.lora_b")
    else:
        device = program.weight_of(call.codes).device
        b = program.add_weight(f"{path}.lora_b", torch.zeros(experts, rows, config.rank, device=device))
        a = program.add_weight(f"{path}.lora_a", _drawn(config, form.groups(call.columns), index, experts).to(device))
    width, scaling = form.width(call.columns), config.alpha / config.rank
    added = StackAdapterCall(a, b, call.columns, width, scaling, call.dtype).insert(program, after=node)
    added.meta[MODULE] = path
    total = program.insert(aten.add.Tensor, (node, added), after=added)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _drawn(config: QALoRA, groups: int, index: int, experts: int | None = None) -> Tensor:
    """A [r, groups], or [E, r, groups]: Xavier uniform, a draw of its own for every site."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    bound = (6.0 / (groups + config.rank)) ** 0.5
    shape = (config.rank, groups) if experts is None else (experts, config.rank, groups)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
