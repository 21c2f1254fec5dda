"""`torch.compile(model, backend="qcompile", options={"recipe": "int4-train"})`: fixed-point training without `train`.

Sites are chosen on the captured Program; the products are then replaced in the graph as Dynamo gave it, which keeps all
that normalizing drops and a gradient needs (detach, no_grad, dropout, checkpointed regions).

The form has no state that a model could save: gradients are clipped at a quantile of each batch, and only the counters
of stochastic rounding move, which live as long as the compiled graph. Weights stay the float parameters of the model,
so any optimizer that was made before goes on; `qcompile.train` has the paper's interval, settles and saves.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.analysis.conv_sites import find_conv_sites
from qcompile.analysis.facts import Facts
from qcompile.backend.inductor import compile_graph
from qcompile.backend.options import Options
from qcompile.backend.rounding_kernels import install_rounding
from qcompile.backend.training_speed import report_speeds, slower_sites, training_speeds
from qcompile.ir.aten_ops import CONVOLUTIONS, LINEAR
from qcompile.ir.capture import capture_dynamo
from qcompile.ir.node_meta import DYNAMO_INDEX, MODULE, SITE, WEIGHT
from qcompile.ir.op_calls import FixedPointConvCall, FixedPointLinearCall
from qcompile.ir.program import Program, copy_graph
from qcompile.passes import FixedPoint
from qcompile.pipeline.run import NothingToQuantize, run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError

_LINEARS = (torch.nn.functional.linear, torch._C._nn.linear)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.nn.functional.conv1d, torch.nn.functional.conv2d)
_STATE = ("act_range", "gamma", "counter")
_OVERRIDE = "options={'on_slow_kernel': 'quantize'}"


def compile_for_training(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Callable[..., Any], Report]:
    """Compile one Dynamo graph whose products train in fixed point.

    Args:
        graph_module: of torch functions, as Dynamo gives it.
        example_inputs: of the first call.
        options: with a recipe that trains.

    Returns:
        A function of the same inputs, and the report.

    Raises:
        RecipeError: a recipe that changes parameters or learns ranges; parameters that are not there, as in the pieces
            that DistributedDataParallel makes.
    """
    recipe = _stateless(options.recipe.with_rules(options.rules))
    if any(isinstance(value, FakeTensor) for value in example_inputs):
        raise RecipeError(
            "the graph came without its parameters, as the pieces that DistributedDataParallel makes of a model. "
            "Fix: qcompile.train(model, 'int4-train') before it is wrapped"
        )
    program = capture_dynamo(graph_module, example_inputs)
    _mark_modules(program)
    facts = Facts(program)
    products = _products(graph_module, program)
    kept = {
        name: "the graph does not call linear or a convolution with it once, outside of checkpointed regions"
        for name in (node.meta[WEIGHT] for node in program.placeholders if WEIGHT in node.meta)
        if name not in products
    }
    speeds = training_speeds(facts, recipe, options.rows)
    if options.on_slow_kernel == "keep_float":
        parameters = {
            n.meta[WEIGHT]: example_inputs[n.meta[DYNAMO_INDEX]] for n in program.placeholders if WEIGHT in n.meta
        }
        kept = _settled_once(slower_sites(speeds, _OVERRIDE), parameters, options.rows) | kept
    names = [site.name for site in facts.sites] + [site.name for site in find_conv_sites(program)]
    rules = tuple(rule for rule in recipe.rules if any(rule.matches(name) for name in names))
    try:
        rewritten, report = run(program, Recipe(recipe.name, recipe.passes, rules), facts=facts, keep_float=kept)
    except (RecipeError, NothingToQuantize) as reason:  # a piece of a broken graph may have no site
        report = Report(recipe.name, breaks=list(program.breaks))
        report.metrics["sites that train"] = 0
        report.breaks.append(f"compiled as it is: {reason}")
        return compile_graph(graph_module, example_inputs, options.inductor), report
    report_speeds(report, speeds)
    install_rounding(value for value in example_inputs if isinstance(value, Tensor))
    graph, states = _with_products(graph_module, products, rewritten)
    inputs = [*example_inputs, *states]
    compiled = compile_graph(graph, inputs, options.inductor)
    return lambda *args: compiled(*args, *states), report


_decided = WeakIdKeyDictionary()
"""Parameter -> (the option `rows`, why its site stays float or "")."""


def _settled_once(slower: dict[str, str], parameters: Mapping[str, Tensor], rows: int | None) -> dict[str, str]:
    """Sites that stay float, by the first graph that trained them.

    Graphs of other sizes follow it (a last, smaller batch, evaluation): a weight that changed between float and four
    bits from graph to graph would be none that was trained.
    """
    kept = {}
    for name, parameter in parameters.items():
        known = _decided.get(parameter)
        reason = known[1] if known is not None and known[0] == rows else slower.get(name, "")
        if torch.is_grad_enabled():
            _decided[parameter] = (rows, reason)
        if reason:
            kept[name] = reason
    return kept


def _stateless(recipe: Recipe) -> Recipe:
    """The recipe with intervals that need no state."""
    passes = []
    for config in recipe.passes:
        if not isinstance(config, FixedPoint) or config.ranges == "learned":
            raise RecipeError(
                f"recipe {recipe.name!r} adds parameters ({type(config).__name__}), which a compiled graph cannot. "
                f"Fix: qcompile.train(model, {recipe.name!r}), then torch.compile(model)"
            )
        stateless = dataclasses.replace(config, interval="quantile") if config.interval == "paper" else config
        passes.append(stateless)
    return dataclasses.replace(recipe, passes=tuple(passes))


def _mark_modules(program: Program) -> None:
    """Every product counts as a module of its own: none is replaced, so none need be one."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in CONVOLUTIONS | {LINEAR}:
            node.meta.setdefault(MODULE, node.name)


def _products(graph_module: fx.GraphModule, program: Program) -> dict[str, fx.Node]:
    """Name of a weight -> the one call of Dynamo's graph that reads it, a linear or a convolution."""
    placeholders = list(graph_module.graph.find_nodes(op="placeholder"))
    found = {}
    for node in program.placeholders:
        if WEIGHT not in node.meta:
            continue
        users = list(placeholders[node.meta[DYNAMO_INDEX]].users)
        if len(users) == 1 and users[0].target in (*_LINEARS, *_CONVOLUTIONS):
            found[node.meta[WEIGHT]] = users[0]
    return found


def _with_products(
    graph_module: fx.GraphModule, products: dict[str, fx.Node], rewritten: Program
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A copy of Dynamo's graph that calls our operators, and the state that it takes as further inputs."""
    copied = copy_graph(graph_module)
    by_name = {node.name: node for node in copied.graph.nodes}
    last = list(copied.graph.find_nodes(op="placeholder"))[-1]
    training = torch.is_grad_enabled()
    states: list[Tensor] = []
    for call_type in (FixedPointLinearCall, FixedPointConvCall):
        for node, call in call_type.find(rewritten):
            product = by_name[products[node.meta[SITE]].name]
            parts = []
            for part in _STATE:
                with copied.graph.inserting_after(last):
                    last = copied.graph.placeholder(f"state_{len(states)}")
                states.append(rewritten.weight_of(getattr(call, part)).clone())
                parts.append(last)
            values = dict(zip(("input", "weight", "bias"), product.args, strict=False)) | dict(product.kwargs)
            arguments = (
                values["input"],
                values["weight"],
                values.get("bias"),
                *parts,
                None,
                None,
                call.format,
                training,
            )
            with copied.graph.inserting_before(product):
                made = copied.graph.call_function(call.target, (*arguments, call.dtype, *call.arguments[11:]))
                output = copied.graph.call_function(operator.getitem, (made, 0))
            product.replace_all_uses_with(output)
            copied.graph.erase_node(product)
    copied.recompile()
    return copied, states
