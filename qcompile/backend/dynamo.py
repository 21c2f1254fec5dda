"""The torch.compile backend: `torch.compile(model, backend="qcompile", options={...})`.

Dynamo hands over one graph at a time (prefill, decode, each piece of a broken graph). Each becomes
a Program, runs through the recipe, is lowered for its device, and goes through Inductor with its
quantized weights as extra inputs. Prepared weights are made once for one weight and kernel and
shared by all graphs; a parameter that changes later is noticed by its version counter.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, fx

from qcompile.analysis.facts import Facts
from qcompile.backend.float_fallback import float_fallback_sites
from qcompile.backend.inductor import GRAPHS, compile_graph, make_floats_constant, needs_gpu
from qcompile.backend.inductor_calls import compile_in_blocks
from qcompile.backend.options import Options
from qcompile.backend.supported_devices import warn_without_kernels, without_kernels
from qcompile.backend.training_graph import compile_for_training
from qcompile.codegen.cpu.cpu_lowering import lower_to_cpu
from qcompile.codegen.cpu.native_kernels import start_loading_native_kernels
from qcompile.ir.capture import capture_dynamo, has_tensor_input
from qcompile.ir.node_meta import DYNAMO_INDEX, STATIC, WEIGHT
from qcompile.ir.op_calls import OUR_OPS
from qcompile.ir.program import Program
from qcompile.memory import weight_cache
from qcompile.pipeline.run import NothingToQuantize, run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError, Rule

TRAINING_OPS = ("qcompile.group_adapter", "qcompile.stack_adapter", "qcompile.fixed_point_", "qcompile.low_rank_linear")
"""Names of operators that only a model in training calls."""

reports: deque[Report] = deque(maxlen=64)
"""Reports of the graphs compiled last, newest last."""


def qcompile(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Args:
        graph_module: of torch functions, as Dynamo gives it.
        example_inputs: of the first call.
        options: see OPTIONS in options.py.
        mode: of torch.compile; see patches_of in inductor.py.

    Returns:
        A function of the same inputs.

    Raises:
        RecipeError: bad options, a recipe that needs data, a rule that matches nothing.
    """
    checked = Options.read({**({} if mode is None else {"mode": mode}), **(options or {})})
    problem = needs_gpu(example_inputs) if checked.inductor.get(GRAPHS) else None
    if problem is not None:
        raise RecipeError(problem)
    elsewhere = without_kernels(example_inputs)
    if elsewhere is not None:
        warn_without_kernels(elsewhere)
        return compile_graph(graph_module, example_inputs, checked.inductor)
    if not has_tensor_input(graph_module):  # a piece of a broken graph without weights: nothing to quantize
        return compile_graph(graph_module, example_inputs, checked.inductor)
    if checked.recipe.trains and not _calls(graph_module, ("qcompile.",)):
        make_floats_constant(graph_module)
        run_training, report = compile_for_training(graph_module, example_inputs, checked)
        reports.append(report)
        return run_training
    if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in example_inputs):
        # The operators of a quantized model, or of one in training, have gradients; those of kernels have none.
        make_floats_constant(graph_module)
        if not _calls(graph_module, TRAINING_OPS):
            _warn_gradients(quantized=_calls(graph_module, ("qcompile.",)))
        return compile_graph(graph_module, example_inputs, checked.inductor)
    make_floats_constant(graph_module)
    return _Compiled(graph_module, example_inputs, checked)


_warned: list[bool] = []


def _calls(graph_module: fx.GraphModule, prefixes: tuple[str, ...]) -> bool:
    """Whether a graph of Dynamo, or a part of it, calls an operator whose name starts with one of the prefixes."""
    graphs = [part.graph for part in graph_module.modules() if isinstance(part, fx.GraphModule)]
    return any(str(node.target).startswith(prefixes) for graph in graphs for node in graph.nodes)


def _warn_gradients(*, quantized: bool) -> None:
    if not _warned:
        _warned.append(True)
        what = "the quantized model is compiled for training" if quantized else "the float model is compiled"
        done = "run its kernels for inference" if quantized else "quantize it"
        warnings.warn(
            f"qcompile: gradients are enabled, so {what}. "
            f"Call the model under torch.no_grad() or torch.inference_mode() to {done}; "
            "qcompile.qa_lora(model) and qcompile.train(model, recipe) prepare it for training in low precision.",
            stacklevel=4,
        )


@dataclass(frozen=True)
class _FromCaller:
    """An input of the lowered graph that the caller passes: its place among Dynamo's inputs."""

    index: int


@dataclass
class _Variant:
    """A graph compiled for the weights of one model.

    Attributes:
        versions: of its weights, by their place among Dynamo's inputs.
        models: weak references to some of them: when they are gone, so is the model.
        order: what the compiled function takes.
        call: the compiled function.
        alive: what keeps its prepared weights in the cache.
    """

    versions: dict[int, tuple[int, int]]
    models: list[weakref.ref[Tensor]]
    order: list[_FromCaller | Tensor]
    call: Callable[..., Any]
    alive: list[Any]

    def serves(self, args: Sequence[Any]) -> bool:
        """Whether these are its weights, unchanged."""
        return all(_version(args[index]) == version for index, version in self.versions.items())


class _Compiled:
    """A compiled graph that recompiles itself when a weight it was made from has changed.

    Dynamo calls one graph with the weights of every model that has the same code, so there is a variant for each.
    """

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.options, self.graph_module = options, graph_module
        if not any(isinstance(i, Tensor) and i.is_cuda for i in example_inputs):
            start_loading_native_kernels()
        self._capture(example_inputs)

    def _capture(self, example_inputs: Sequence[Any]) -> None:
        self.program = capture_dynamo(self.graph_module, example_inputs)
        self.weight_indices = {
            n.meta[WEIGHT]: n.meta[DYNAMO_INDEX] for n in self.program.placeholders if WEIGHT in n.meta
        }
        self.input_indices = [n.meta[DYNAMO_INDEX] for n in self.program.inputs]
        self.variants: list[_Variant] = []
        self.variant = self._compile(example_inputs)

    def _compile(self, args: Sequence[Any]) -> _Variant:
        for name, index in self.weight_indices.items():
            if name in self.program.weights:
                fresh = args[index].detach()
                self.program.weights[name] = fresh.t() if name in self.program.transposed else fresh
        versions = {i: _version(args[i]) for i in self.weight_indices.values()}
        lowered, report = compile_program(self.program, [args[i] for i in self.input_indices], self.options)
        reports.append(report)
        order: list[_FromCaller | Tensor] = []
        for node in lowered.placeholders:
            name = node.meta.get(WEIGHT)
            place: Any = node.meta[DYNAMO_INDEX] if name is None else self._index_of_unchanged(lowered, name)
            if name is None or place is not None:
                order.append(_FromCaller(place))
            else:
                tensor = lowered.weights[name]
                order.append(tensor)
                # A pass may have given it other strides than the placeholder was traced with.
                node.meta["val"] = lowered.fake_mode.from_tensor(tensor, static_shapes=True)
        examples = [n.meta["val"] for n in lowered.placeholders]
        static = [i for i, n in enumerate(lowered.placeholders) if WEIGHT in n.meta or STATIC in n.meta]
        patches, cut = self.options.inductor, self.options.compile_blocks and not self.options.inductor.get(GRAPHS)
        if cut:
            call = compile_in_blocks(lowered.graph_module, examples, patches, static, compile_graph)
        else:
            call = compile_graph(lowered.graph_module, examples, patches, static)
        models = [weakref.ref(args[index]) for index in list(versions)[:1]]
        made = _Variant(versions, models, order, call, lowered.alive)
        addresses = [address for address, _ in versions.values()]
        others = [v for v in self.variants if [address for address, _ in v.versions.values()] != addresses]
        self.variants = [*(v for v in others if all(ref() is not None for ref in v.models)), made]
        return made

    def _index_of_unchanged(self, lowered: Program, name: str) -> int | None:
        """Where the caller passes a weight that no pass changed; None for any other."""
        same = lowered.weights[name] is self.program.weights.get(name)
        return self.weight_indices.get(name) if same and name not in self.program.transposed else None

    def __call__(self, *args: Any) -> Any:
        if any(args[index].item() != value for index, value in self.program.scalars.items()):
            self._capture(args)
        if not self.variant.serves(args):
            known = next((variant for variant in self.variants if variant.serves(args)), None)
            self.variant = known or self._compile(args)
        variant = self.variant
        return variant.call(*[args[part.index] if isinstance(part, _FromCaller) else part for part in variant.order])


def _version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a parameter is written to or replaced; inference tensors are never written."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def compile_program(program: Program, inputs: Sequence[Any], options: Options) -> tuple[Program, Report]:
    """Run the recipe and lower for the device that the weights are on.

    Args:
        program: as captured; not changed.
        inputs: one call's flat inputs, to certify exact passes on.
        options: of the backend.

    Returns:
        The lowered program and the report.
    """
    # int(i) would pin the symbol to this one value, and every new length would recompile.
    example = [i.node.hint if isinstance(i, torch.SymInt) else i for i in inputs]
    facts = Facts(program)
    recipe, rules = Recipe("already quantized"), dict[str, Rule | None]()
    if not _is_quantized(program):
        recipe = _applicable(options, facts)
        rules = recipe.resolve(dict.fromkeys(site.name for site in facts.sites))
    keep_float: dict[str, str] = {}
    if options.on_slow_kernel == "keep_float":
        keep_float = float_fallback_sites(facts, recipe, rules, _gpu(program), options.rows)
    # Neither a size that depends on data nor a subclass of Tensor can be computed with.
    concrete = all(type(i) in (int, float, bool, Tensor, torch.nn.Parameter) for i in example)
    try:
        rewritten, report = run(
            program, recipe, facts=facts, rules=rules, example=example if concrete else None, verify=options.verify,
            keep_float=keep_float, dump=options.dump,
        )  # fmt: skip
    except NothingToQuantize as reason:
        rewritten, report = run(program, Recipe(recipe.name), facts=facts, verify=False)
        for site in report.sites:
            site.reason = keep_float.get(site.name, str(reason))
    kernels = _lower(rewritten)
    by_name = {site.name: site for site in report.sites}
    for name, by_rows in kernels.items():
        if name in by_name:
            by_name[name].kernel = by_rows
    rewritten.graph_module.recompile()
    return rewritten, report


def _lower(program: Program) -> dict[str, dict[str, str]]:
    """Lower for the device of the weights, in place; gives the kernel of every site for its rows."""

    def remember(kernel: str, tensors: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        entry = weight_cache.cached(kernel, tensors, make)
        program.alive.append(entry)
        return entry.tensors

    device = _gpu(program)
    if device is None:
        return lower_to_cpu(program, remember)
    from qcompile.codegen.triton.gpu_lowering import lower_to_gpu
    from qcompile.codegen.triton.launch.gemm import gpu

    return lower_to_gpu(program, remember, gpu(device))


def _is_quantized(program: Program) -> bool:
    """Whether the model came quantized, as one that `qcompile.quantize` wrote into."""
    return any(node.target in OUR_OPS for node in program.graph.nodes)


def _gpu(program: Program) -> torch.device | None:
    """The GPU that the weights are on, if they are."""
    return next((tensor.device for tensor in program.weights.values() if tensor.is_cuda), None)


def _applicable(options: Options, facts: Facts) -> Recipe:
    """The recipe with the rules that match here: a model has many graphs, a rule need not match all."""
    names = [site.name for site in facts.sites]
    every = options.recipe.with_rules(options.rules)
    rules = [rule for rule in every.rules if any(rule.matches(name) for name in names)]
    if names and len(rules) < len(every.rules):
        # In one whole graph an idle rule is a mistake; in a piece of a broken graph it may be meant for another piece.
        if not (facts.program.breaks or torch._dynamo.utils.counters["graph_break"]):
            every.resolve(names)  # raises, with the nearest names
    return Recipe(every.name, every.passes, tuple(rules), every.source)
