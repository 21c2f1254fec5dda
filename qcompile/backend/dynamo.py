"""The torch.compile backend: `torch.compile(model, backend="qcompile", options={...})`.

Dynamo hands over one graph at a time (prefill, decode, each piece of a broken graph). Each becomes
a Program, runs through the recipe, is lowered for its device, and goes through Inductor with its
quantized weights as extra inputs. Prepared weights are made once for one weight and kernel and
shared by all graphs; a parameter that changes later is noticed by its version counter.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, fx

from qcompile.analysis.sites import find_sites
from qcompile.backend.float_fallback import float_fallback_sites
from qcompile.backend.inductor import GRAPHS, compile_graph, make_floats_constant, needs_gpu
from qcompile.backend.options import Options
from qcompile.codegen.cpu.cpu_lowering import lower
from qcompile.ir.capture import capture_dynamo
from qcompile.ir.node_meta import DYNAMO_INDEX, STATIC, WEIGHT
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import shared
from qcompile.pipeline.run import NothingToQuantize, run
from qcompile.recipe.recipe import Recipe, RecipeError
from qcompile.recipe.report import Report

reports: deque[Report] = deque(maxlen=64)
"""Reports of the graphs compiled last, newest last."""


def qcompile(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph; see OPTIONS.

    Raises:
        RecipeError: bad options, a recipe that needs data, a rule that matches nothing.
    """
    config = Options.read({**({} if mode is None else {"mode": mode}), **(options or {})})
    problem = needs_gpu(example_inputs) if config.inductor.get(GRAPHS) else None
    if problem is not None:
        raise RecipeError(problem)
    if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in example_inputs):
        _warn_gradients()
        return compile_graph(graph_module, example_inputs, config.inductor)
    make_floats_constant(graph_module)
    return _Compiled(graph_module, example_inputs, config)


_warned: list[bool] = []


def _warn_gradients() -> None:
    if not _warned:
        _warned.append(True)
        warnings.warn(
            "qcompile: gradients are enabled, so the float model is compiled. "
            "Call the model under torch.no_grad() or torch.inference_mode() to quantize it.",
            stacklevel=3,
        )


class _Compiled:
    """A compiled graph that recompiles itself when a weight it was made from has changed."""

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Options) -> None:
        self.config, self.graph_module = config, graph_module
        self._capture(example_inputs)

    def _capture(self, example_inputs: Sequence[Any]) -> None:
        self.program = capture_dynamo(self.graph_module, example_inputs)
        self.weight_args = {n.meta[WEIGHT]: n.meta[DYNAMO_INDEX] for n in self.program.placeholders if WEIGHT in n.meta}
        self.input_args = [n.meta[DYNAMO_INDEX] for n in self.program.inputs]
        self._compile(example_inputs)

    def _compile(self, args: Sequence[Any]) -> None:
        for name, index in self.weight_args.items():
            if name in self.program.weights:
                fresh = args[index].detach()
                self.program.weights[name] = fresh.t() if name in self.program.transposed else fresh
        self.versions = {i: _version(args[i]) for i in self.weight_args.values()}
        lowered, report = compile_program(self.program, args, self.input_args, self.config)
        self.keep = lowered.alive
        reports.append(report)
        self.order: list[tuple[bool, Any]] = []
        for node in lowered.placeholders:
            name = node.meta.get(WEIGHT)
            if name is None:
                self.order.append((True, node.meta[DYNAMO_INDEX]))
            else:
                index = self.weight_args.get(name)
                same = index is not None and lowered.weights[name] is self.program.weights.get(name)
                live = same and name not in self.program.transposed
                tensor = lowered.weights[name]
                self.order.append((True, index) if live else (False, tensor))
                if not live:  # a pass may have left other strides than the placeholder was traced with
                    node.meta["val"] = lowered.fake_mode.from_tensor(tensor, static_shapes=True)
        examples = [n.meta["val"] for n in lowered.placeholders]
        static = [i for i, n in enumerate(lowered.placeholders) if WEIGHT in n.meta or STATIC in n.meta]
        self.call = compile_graph(lowered.graph_module, examples, self.config.inductor, static)

    def __call__(self, *args: Any) -> Any:
        if any(args[index].item() != value for index, value in self.program.scalars.items()):
            self._capture(args)
        for index, version in self.versions.items():
            if _version(args[index]) != version:
                self._compile(args)
                break
        return self.call(*[args[what] if live else what for live, what in self.order])


def _version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a parameter is written to or replaced; inference tensors are never written."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def compile_program(
    program: Program, args: Sequence[Any], input_args: Sequence[int], config: Options
) -> tuple[Program, Report]:
    """Run the recipe and lower for the device that the weights are on."""
    inputs = [args[i] for i in input_args]
    # int(i) would pin the symbol to this one value, and every new length would recompile.
    example = [i.node.hint if isinstance(i, torch.SymInt) else i for i in inputs]
    ready = any("qcompile" in str(n.target) for n in program.graph.nodes)
    recipe = Recipe("already quantized") if ready else _applicable(config, program)
    keep = (
        float_fallback_sites(program, recipe, _gpu(program), config.rows)
        if config.on_slow_kernel == "keep_float"
        else {}
    )
    concrete = all(not isinstance(i, Tensor) or type(i) in (Tensor, torch.nn.Parameter) for i in example)
    try:
        rewritten, report = run(program, recipe, example=example if concrete else None, verify=config.verify, keep=keep)
    except NothingToQuantize as reason:
        rewritten, report = run(program, Recipe(recipe.name), verify=False)
        for site in report.sites:
            site.reason = keep.get(site.name, str(reason))

    def remember(kernel: str, tensors: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        made = shared(kernel, tensors, make)
        rewritten.alive.append(made)
        return made.tensors

    device = _gpu(rewritten)
    if device is None:
        kernels = lower(rewritten, remember)
    else:
        from qcompile.codegen.triton.gpu_lowering import lower as lower_for_gpu
        from qcompile.codegen.triton.launch.gemm import gpu

        kernels = lower_for_gpu(rewritten, remember, gpu(device))
    named = {site.name: site for site in report.sites}
    for name, by_regime in kernels.items():
        if name in named:
            named[name].kernel = by_regime
    rewritten.graph_module.recompile()
    return rewritten, report


def _gpu(program: Program) -> torch.device | None:
    """The GPU that the weights are on, if they are."""
    return next((tensor.device for tensor in program.weights.values() if tensor.is_cuda), None)


def _applicable(config: Options, program: Program) -> Recipe:
    """The recipe with the rules that match here: a model has many graphs, a rule need not match all."""
    import fnmatch

    names = [site.name for site in find_sites(program)]
    rules = [r for r in (*config.rules, *config.recipe.rules) if any(fnmatch.fnmatchcase(n, r.match) for n in names)]
    if names and len(rules) < len(config.rules) + len(config.recipe.rules):
        # In one whole graph an idle rule is a mistake; in a piece of a broken one it may be for another.
        if not (program.breaks or torch._dynamo.utils.counters["graph_break"]):
            config.recipe.with_rules(config.rules).resolve(names)  # raises, with the nearest names
    return Recipe(config.recipe.name, config.recipe.passes, tuple(rules), config.recipe.source)
