"""Quantize: weights to nearest, activations dynamically, as plain quantize/dequantize around matmuls.

Source: "Give Me BF16 or Give Me Death", arXiv:2411.02355 sec. 3 (round to nearest, dynamic per-token
        activations); MSE clip from GPTQ's code (arXiv:2210.17323).
Law:    |w - dq(q(w))| <= s / 2 inside the range; the inserted graph is the meaning of the result.
        A stack of experts is quantized expert by expert, weight-only: row n of expert e is a row.
Needs:  nothing.   Leaves: sites that a rule keeps, what chooses experts; weights shared with a float
        reader are copied (the other reader keeps the float table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile.calibrate import Statistics
from qcompile.formats import Format
from qcompile.program import Program
from qcompile.recipe import RecipeError, Rule, rewrites
from qcompile.report import PassReport
from qcompile.rounding import quantize_tensor
from qcompile.sharing import shared
from qcompile.sites import Site, find_sites

ops = torch.ops.qcompile
aten = torch.ops.aten

_PRODUCTS = {
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
}


# Rewritings of the float model, and what must stand before codes are chosen.
EXACT = (
    "Untie",
    "FoldNorm",
    "Smooth",
    "SmoothAttention",
    "SmoothQuantPlus",
    "AWQ",
    "Reorder",
    "Rotate",
    "RotateOnline",
)
BEFORE = (*EXACT, "IntactKV", "QuantizeKV")


@dataclass(frozen=True)
class Quantize:
    """Formats of weights and activations; None keeps the activation float.

    The last product (the logits) is the most sensitive one and in decoding as large as any: it has
    formats of its own; `output` None treats it as every other site.
    """

    weight: Format = Format("int8")
    act: Format | None = Format("int8")
    output: Format | None = Format("int8")  # of sites that write the graph's output
    output_act: Format | None = None  # of their activations
    clip: bool = False  # search the clip of each weight range that minimises sum |e|^2.4

    def __post_init__(self) -> None:
        for name in ("weight", "act", "output", "output_act"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Format.parse(getattr(self, name)))
        for act in (self.act, self.output_act):
            if act is not None and act.two_level:
                raise RecipeError(f"Quantize: an activation has no second level ({act})")
        if self.weight.smooth:
            raise RecipeError(f"Quantize: smooth is for activations, not for a weight ({self.weight})")


@dataclass(frozen=True)
class SitePlan:
    """What a recipe's rules and the caller say of single sites, and the data to choose codes with.

    Attributes:
        rules: the first matching rule of a site name, or None; a pass may write formats here for the quantizing
            pass behind it (PerTensor). keep: sites to leave float -> reason.
        batches: a fresh iterator of the program's flat inputs, for passes that need data.
        corrected: a later pass compares the codes with the float weights: hold these.
        progress: show bars. reference: the program before all passes. made: tensors that earlier
            passes made for the calls of the module (report.py).
    """

    rules: dict[str, Rule | None] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    batches: Callable[[], Iterable[Sequence[Any]]] | None = None
    corrected: bool = False
    progress: bool = False
    reference: Program | None = None
    made: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """A site to quantize, and its formats; `last`: it makes the logits, in the recipe's own format for them."""

    site: Site
    weight: Format
    act: Format | None
    last: bool = False


@rewrites(Quantize, exact=False, sitewise=True, after=BEFORE)
def quantize(program: Program, how: Quantize, seen: Statistics, plan: SitePlan) -> PassReport:
    """Insert Q/DQ at every wanted site, rounding to nearest, in place."""
    report = PassReport("Quantize")
    for wanted in wanted_sites(program, how, plan, report):
        name, original = wanted.site.name, matrix_of(program, wanted.site)

        def make(original: Tensor = original, wanted: Wanted = wanted) -> tuple[Tensor | None, ...]:
            try:
                q = quantize_tensor(original, wanted.weight, clip=how.clip)
            except ValueError as error:
                name = wanted.site.name
                raise RecipeError(f"Quantize: the weight {name} cannot be quantized: {error}") from error
            return q.stored(), q.scale, q.zero, q.group_scale

        made = shared(("codes", str(wanted.weight), how.clip), [original], make)
        program.alive.append(made)
        put_codes(program, wanted, made.tensors, plan)
        report.done.append(name)
    return report


def wanted_sites(program: Program, how: Quantize, plan: SitePlan, report: PassReport) -> list[Wanted]:
    """The sites to quantize, in graph order; the others are left with their reasons."""
    found = []
    for site in find_sites(program):
        rule = plan.rules.get(site.name)
        if site.name in plan.keep:
            report.leave(site.name, plan.keep[site.name])
        elif rule is not None and rule.keep:
            report.leave(site.name, f"kept float by the rule {rule.match!r}")
        elif rule is None and chooses_experts(site):
            report.leave(site.name, "its output chooses experts: one flipped choice costs more than its bytes")
        elif site.kind == "experts" and not (site.grouped or site.batched):
            report.leave(site.name, "neither rows sorted by expert nor [E, T, K] by [E, K, N]", site.node.name)
        else:
            last = how.output is not None and (rule is None or rule.weight is None) and writes_output(site)
            found.append(Wanted(site, *formats_of(site, how, rule), last))
    return found


def corrected_sites(program: Program) -> list[tuple[torch.fx.Node, Tensor, Tensor]]:
    """The products of quantized sites with the float weight and what the codes stand for, [N, K] each."""
    found = []
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        if "original" in node.meta:
            args = [
                program.weights[program.weight_name(a) or ""] if isinstance(a, torch.fx.Node) else a
                for a in node.args[1].args
            ]
            found.append((node, node.meta["original"], ops.dequantize(*args)))
    return found


def float_input(product: torch.fx.Node) -> torch.fx.Node:
    """What a quantized product reads, before the quantization of activations."""
    x = product.args[0]
    if x.target is ops.dequantize.default:
        x = x.args[0].args[0].args[0]  # dequantize(codes = getitem(quantize(x), 0))
    return x


def formats_of(site: Site, how: Quantize, rule: Rule | None) -> tuple[Format, Format | None]:
    """Weight and activation format of one site."""
    weight, act = how.weight, how.act
    if how.output is not None and writes_output(site):
        weight, act = how.output, how.output_act
    if rule is not None:
        weight, act = rule.weight or weight, rule.act or act
    return weight, None if site.kind == "experts" else act


def matrix_of(program: Program, site: Site) -> Tensor:
    """A site's weight as rows, [N, K]; of a stack of experts, all of them, [E N, K]."""
    weight = program.weights[site.name]
    if site.kind == "linear":
        return weight
    return (weight if site.rows_first else weight.transpose(1, 2)).flatten(0, 1)


def writes_output(site: Site) -> bool:
    """Whether what a site computes reaches the graph's outputs and no further product."""
    work, seen = list(site.node.users), set()
    meets_output = False
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "output":
            meets_output = True
        elif node.target in _PRODUCTS:
            return False
        work += list(node.users)
    return meets_output


def chooses_experts(site: Site) -> bool:
    """Whether the output of a site reaches a top-k through elementwise operations only."""
    work, seen = [site.node], set()
    while work:
        node = work.pop()
        if node.target is torch.ops.aten.topk.default:
            return True
        shape = node.meta["val"].shape[-1:] if hasattr(node.meta.get("val"), "shape") else None
        if node in seen or shape != site.node.meta["val"].shape[-1:]:
            continue
        seen.add(node)
        work += [u for u in node.users if u.target is not torch.ops.aten.linear.default]
    return False


def put_codes(program: Program, wanted: Wanted, tensors: tuple[Tensor | None, ...], plan: SitePlan) -> None:
    """Make a site read stored codes (with scale, zero, group scale) and a quantized input.

    The tensors are of `matrix_of`; those of a stack get their leading E back.
    """
    site, act = wanted.site, wanted.act
    if site.kind == "experts":
        _put_stack(program, wanted, tensors)
        return
    original = program.weights[site.name]
    dtype, weight_dtype = site.node.meta["val"].dtype, original.dtype
    site.node.meta["site"] = site.name
    if plan.corrected:
        site.node.meta["original"] = original
    nodes = add_stored(program, site.name, tensors)
    numbers = program.insert(
        ops.dequantize.default, (*nodes, str(wanted.weight), site.K, weight_dtype), before=site.node
    )
    x = site.input
    if act is not None:
        codes, scale, zero = quantized_input(program, x, act)
        x = program.insert(
            ops.dequantize.default,
            (codes, scale, zero if act.zero != "none" else None, None, str(act), 0, dtype),
            before=site.node,
        )
    site.node.args = (x, numbers, *site.node.args[2:])


def _put_stack(program: Program, wanted: Wanted, tensors: tuple[Tensor | None, ...]) -> None:
    site = wanted.site
    dtype = program.weights[site.name].dtype
    stacked = tuple(t if t is None or not t.ndim else t.unflatten(0, (-1, site.N)) for t in tensors)
    nodes = add_stored(program, site.name, stacked)
    numbers = program.insert(ops.dequantize.default, (*nodes, str(wanted.weight), site.K, dtype), before=site.node)
    if site.rows_first:
        turn = site.node.args[1]
        numbers = program.insert(turn.target, (numbers, *turn.args[1:]), before=site.node)
    else:
        numbers = program.insert(aten.transpose.int, (numbers, 1, 2), before=site.node)
    site.node.args = (site.node.args[0], numbers, *site.node.args[2:])
    site.node.meta["site"] = site.name


def add_stored(program: Program, name: str, tensors: tuple[Tensor | None, ...]) -> tuple[object, ...]:
    """Add stored codes, scale, zero and group scale as weights "<name>.codes", ..; absent ones are None."""
    found: list[object] = []
    for part, tensor in zip(("codes", "scale", "zero", "group_scale"), tensors, strict=True):
        full = f"{name}.{part}"
        if tensor is None:
            found.append(None)
        elif full in program.weights:  # two sites on one weight share its codes
            found.append(program.node_of(full))
        else:
            found.append(program.add_weight(full, tensor))
    return tuple(found)


def quantized_input(program: Program, x: object, act: Format) -> tuple[object, object, object]:
    """The codes, scale and zero of a value: one quantization for all sites that read it."""
    import operator

    assert isinstance(x, torch.fx.Node)
    for user in x.users:
        if user.target is ops.quantize.default and user.args[1] == str(act):
            codes, scale, zero = sorted(user.users, key=lambda n: n.args[1])
            return codes, scale, zero
    pair = program.insert(ops.quantize.default, (x, str(act)), after=x)
    parts: list[object] = []
    last = pair
    for index in range(3):
        last = program.insert(operator.getitem, (pair, index), after=last)
        parts.append(last)
    return tuple(parts)
