"""From a module or a Dynamo graph to a `Program`.

Two entries, one result. `torch.export` names the weights in its signature; Dynamo passes them as
placeholders whose source holds the attribute path. Both are brought to pre-dispatch ATen and
normalized (see normalize.py), so that passes see one form.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.ir.call_tree import CallTree, tensors_of
from qcompile.ir.causal_hints import causal_hints_as_told
from qcompile.ir.linear_modules import find_linear_modules, recorded_calls
from qcompile.ir.node_meta import DYNAMO_INDEX, STATIC, WEIGHT
from qcompile.ir.normalize import normalize
from qcompile.ir.program import Program, copy_graph
from qcompile.ir.stand_ins import stand_ins
from qcompile.ir.trace_failure import CaptureError, failure
from qcompile.ir.vmap_regions import expand_vmaps

__all__ = ["CaptureError", "attribute_path", "capture", "capture_dynamo", "from_exported", "has_tensor_input"]

_SEGMENT = re.compile(r"\[(?:'([^']+)'|\"([^\"]+)\"|(\d+))\]|\.(\w+)")
_CONTAINERS = {"_modules", "_parameters", "_buffers"}
_LOGS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch._export.non_strict_utils")


def capture(
    module: nn.Module,
    args: Sequence[Any] | Mapping[str, Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool = True,
) -> Program:
    """Trace a module to one Program with `torch.export`.

    The weights of the Program are the module's own tensors, not copies. Its inputs are the tensors of the call, in
    order, wherever they lie in it (call_tree.py); what is no tensor becomes a constant. With `dynamic`, the first two
    dimensions of every input tensor stay symbolic where the model allows it; a size of 1 would be specialized, so give
    examples with at least 2 rows.

    Args:
        module: the model, in evaluation mode.
        args: example inputs by position; one tensor, or a mapping of inputs by name, as a batch of `quantize`.
        kwargs: example inputs by name.
        dynamic: whether sizes stay symbolic.

    Returns:
        The normalized Program.

    Raises:
        CaptureError: the module does not run on this example, or breaks the graph; the text holds the line and the
            reason.
    """
    named = {**args, **(kwargs or {})} if isinstance(args, Mapping) else kwargs or {}
    positional: Sequence[Any] = () if isinstance(args, Mapping) else (args,) if isinstance(args, Tensor) else args
    call = _uncached(CallTree.of(positional, named, module))
    tensors = [tensor.detach() for tensor in call.tensors.values()]
    auto = torch.export.Dim.AUTO
    shapes = tuple({d: auto for d in range(min(t.ndim, 2))} if dynamic else None for t in tensors)
    flat = _FlatCall(module, call)
    with (
        quiet_frontends(),
        contextlib.redirect_stderr(io.StringIO()),  # torch.export prints the graph up to where it fails
        _without_cache(module),
        causal_hints_as_told(),
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
        recorded_calls(module) as odd,
        stand_ins(module, tensors) as traced,
    ):
        try:
            exported = torch.export.export(flat, tuple(traced), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:
            raise failure(module, call, error) from error
    program = from_exported(exported, flat, "module.", find_linear_modules(module, odd, "module."))
    for node, path in zip(program.inputs, call.tensors, strict=True):
        node._rename(re.sub(r"\W+", "_", path).strip("_") or "input")
        node.target = node.name
    program.graph_module.recompile()
    return program


def run_as_captured(module: nn.Module, call: CallTree) -> tuple[list[Tensor], int | None]:
    """What a captured module gives back when it is called.

    Args:
        module: in evaluation mode.
        call: its arguments.

    Returns:
        The tensors in the order of the Program's outputs, and which of them the module calls logits (None: none).
    """
    output = output_as_captured(module, call)
    found = tensors_of(output)
    logits = getattr(output, "logits", None)
    return found, next((index for index, tensor in enumerate(found) if tensor is logits), None)


def output_as_captured(module: nn.Module, call: CallTree) -> Any:
    """What a module in evaluation mode gives back for a call, as a graph captured from it does: without a cache."""
    with quiet_frontends(), _without_cache(module), torch.compiler.set_stance("force_eager"), torch.no_grad():
        return module(*call.args, **_uncached(call).kwargs)


def _uncached(call: CallTree) -> CallTree:
    """A call that asks for no cache."""
    kwargs = {**call.kwargs, "use_cache": False} if call.kwargs.get("use_cache") is True else call.kwargs
    return CallTree(call.args, kwargs, call.names)


class _FlatCall(nn.Module):
    """A module whose call takes the tensors of its arguments and gives those of its results."""

    def __init__(self, module: nn.Module, call: CallTree) -> None:
        super().__init__()
        self.module, self.call = module, call
        self.training = module.training

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        call = self.call.with_tensors(tensors)
        found = tensors_of(self.module(*call.args, **call.kwargs))
        if not found:
            raise ValueError("no tensor in the output")
        return found


def from_exported(
    exported: torch.export.ExportedProgram,
    module: nn.Module,
    prefix: str = "",
    note: Callable[[Program], None] | None = None,
) -> Program:
    """The Program of what torch.export made of a module; its weights are the module's own tensors.

    Args:
        exported: from `module`.
        module: what was traced.
        prefix: of the attribute paths, to drop: the path of the part of `module` that the Program is of.
        note: called with the graph as captured, before it is normalized.
    """
    spec = exported.graph_signature
    named: dict[str, str] = {**spec.inputs_to_parameters, **spec.inputs_to_buffers}
    own = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    constants = {s.arg.name: s.target for s in spec.input_specs if s.target and s.arg.name not in named}
    graph_module = exported.graph_module
    values = (node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder"))
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), contextlib.nullcontext())
    with mode, quiet_frontends():
        expand_vmaps(graph_module)
    weights: dict[str, Tensor] = {}
    for node in list(graph_module.graph.find_nodes(op="placeholder")):
        name = named.get(node.name) or constants.get(node.name)
        if name is None:
            continue
        tensor = own.get(name)
        if tensor is None:
            tensor = exported.constants[name]
        node.meta[WEIGHT] = name.removeprefix(prefix)
        weights[node.meta[WEIGHT]] = tensor.detach()
    return normalize(Program(graph_module, weights), note)


def has_tensor_input(graph_module: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo takes a tensor; one of constants and sizes only has no weight either."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return any(isinstance(node.meta.get("example_value"), Tensor) for node in placeholders)


def capture_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Bring a graph that Dynamo handed to a backend to a Program.

    Tracing runs inside the fake mode of the placeholders' own fakes, which keeps Dynamo's symbols.
    The Program's placeholders keep Dynamo's order; `meta[DYNAMO_INDEX]` remembers it.

    Raises:
        CaptureError: the graph has no tensor input (see `has_tensor_input`).
    """
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    graph_module = copy_graph(graph_module)
    placeholders = list(graph_module.graph.find_nodes(op="placeholder"))
    fakes = [n.meta["example_value"] for n in placeholders]
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:
        raise CaptureError("the graph has no tensor input: nothing to quantize. Fix: compile it as it is")
    baked = _bake_scalars(graph_module, placeholders, example_inputs)
    with mode, quiet_frontends():
        expand_vmaps(graph_module, "example_value")
    with torch.fx.traceback.preserve_node_meta(), mode, quiet_frontends():
        module = make_fx(graph_module, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    weights: dict[str, Tensor] = {}
    traced = list(module.graph.find_nodes(op="placeholder"))
    for index, (node, origin, real) in enumerate(zip(traced, placeholders, example_inputs, strict=True)):
        node.meta[DYNAMO_INDEX] = index
        node.meta.setdefault("val", fakes[index])
        if (origin.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"):
            node.meta[STATIC] = True
        grapharg = origin.meta.get("grapharg")
        path = attribute_path(grapharg.source.name) if grapharg is not None else None
        if path is not None and isinstance(real, Tensor) and real.device.type != "meta":
            node.meta[WEIGHT] = path if path not in weights else f"{path}#{index}"
            weights[node.meta[WEIGHT]] = real.detach()
    program = normalize(Program(module, weights))
    program.scalars = baked
    if reason is not None and reason.graph_break:
        place = reason.user_stack[-1] if reason.user_stack else None
        where = f" at {place.filename}:{place.lineno}" if place is not None else ""
        program.breaks.append(f"{str(reason.reason).strip().splitlines()[0]}{where}")
    return program


def _bake_scalars(
    graph_module: fx.GraphModule, placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]
) -> dict[int, float]:
    """Python scalars that Dynamo passes as 0-d tensors and reads by `.item()` become constants.

    The caller compares them at every call: index among the inputs -> value.
    """
    baked: dict[int, float] = {}
    for index, (node, real) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if not isinstance(real, Tensor) or real.ndim or real.device.type != "cpu":
            continue
        for user in [u for u in node.users if u.op == "call_method" and u.target == "item"]:
            baked[index] = real.item()
            user.replace_all_uses_with(baked[index])
            graph_module.graph.erase_node(user)
    if baked:
        graph_module.recompile()
    return baked


def attribute_path(source: str) -> str | None:
    """`L['self']._modules['a']._parameters['weight']` -> "a.weight"; None for a plain input."""
    if not any(f".{c}[" in source for c in ("_parameters", "_buffers")):
        return None
    head = source.find("._modules")
    if head < 0:
        head = min(i for i in (source.find("._parameters"), source.find("._buffers")) if i >= 0)
    found = [next(g for g in m if g) for m in _SEGMENT.findall(source[head:])]
    return ".".join(s for s in found if s not in _CONTAINERS)


@contextlib.contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """A decoder is captured without its key/value cache: state would only be an extra output."""
    configs = [config for config in _configs(module) if getattr(config, "use_cache", False) is True]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _configs(module: nn.Module) -> list[Any]:
    """The configs of all parts of a model, and those inside of them."""
    work = [getattr(part, name, None) for part in module.modules() for name in ("config", "generation_config")]
    found: dict[int, Any] = {}
    while work:
        config = work.pop()
        if id(config) not in found and isinstance(getattr(config, "__dict__", None), dict):
            found[id(config)] = config
            work += [inner for inner in vars(config).values() if hasattr(inner, "use_cache")]
    return list(found.values())


@contextlib.contextmanager
def quiet_frontends() -> Iterator[None]:
    """The frontends warn about their own internals, and note for each node the lines of code that made it.

    Nothing reads these lines, and finding them takes time at every node.
    """
    logs = [logging.getLogger(name) for name in _LOGS]
    levels = [log.level for log in logs]
    unnoted, fx_config.do_not_emit_stack_traces = fx_config.do_not_emit_stack_traces, True
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fx_config.do_not_emit_stack_traces = unnoted
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
