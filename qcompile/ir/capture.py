"""From a module or a Dynamo graph to a `Program`.

Two entries, one result. `torch.export` names the weights in its signature; Dynamo passes them as
placeholders whose source holds the attribute path. Both are brought to pre-dispatch ATen and
normalized (see normalize.py), so that passes see one form.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.ir.node_meta import DYNAMO_INDEX, STATIC, WEIGHT
from qcompile.ir.normalize import normalize
from qcompile.ir.program import Program, copy_graph

_SEGMENT = re.compile(r"\[(?:'([^']+)'|\"([^\"]+)\"|(\d+))\]|\.(\w+)")
_CONTAINERS = {"_modules", "_parameters", "_buffers"}


class CaptureError(ValueError):
    """The model cannot be traced to one graph; the message names the place and the fix."""


def capture(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool = True,
) -> Program:
    """Trace a module to one Program with `torch.export`.

    The weights of the Program are the module's own tensors, not copies. With `dynamic`, the first
    two dimensions of every input tensor stay symbolic where the model allows it; a size of 1 would
    be specialized, so give examples with at least 2 rows.

    Args:
        module: the model, in evaluation mode.
        args: example inputs by position.
        kwargs: example inputs by name.
        dynamic: whether sizes stay symbolic.

    Returns:
        The normalized Program.

    Raises:
        CaptureError: the model breaks the graph; the text holds the frontend's own reason.
    """
    kwargs = dict(kwargs or {})
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {d: auto for d in range(min(value.ndim, 2))} if dynamic else None
        return None

    shapes = torch.utils._pytree.tree_map(free, (tuple(args), kwargs))
    dynamic_shapes = None
    if dynamic:
        names = _parameter_names(module, len(args))
        dynamic_shapes = {**dict(zip(names, shapes[0], strict=False)), **shapes[1]}
    with _quiet(), _without_cache(module), torch.no_grad():
        try:
            exported = torch.export.export(module, tuple(args), kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            raise CaptureError(
                f"{type(module).__name__} cannot be traced to one graph: "
                f"{str(error).strip().splitlines()[0] if str(error) else type(error).__name__}. "
                "Fix: make the named line traceable, or use torch.compile(model, backend='qcompile'), "
                "which compiles each sub-graph on its own."
            ) from error
    return from_exported(exported, module)


def from_exported(exported: torch.export.ExportedProgram, module: nn.Module) -> Program:
    """The Program of what torch.export made of a module; its weights are the module's own tensors."""
    spec = exported.graph_signature
    named: dict[str, str] = {**spec.inputs_to_parameters, **spec.inputs_to_buffers}
    own = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    constants = {s.arg.name: s.target for s in spec.input_specs if s.target and s.arg.name not in named}
    graph_module = exported.graph_module
    weights: dict[str, Tensor] = {}
    for node in list(graph_module.graph.find_nodes(op="placeholder")):
        name = named.get(node.name) or constants.get(node.name)
        if name is None:
            continue
        tensor = own.get(name)
        if tensor is None:
            tensor = exported.constants[name]
        node.meta[WEIGHT] = name
        weights[name] = tensor.detach()
    return normalize(Program(graph_module, weights))


def capture_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Bring a graph that Dynamo handed to a backend to a Program.

    Tracing runs inside the fake mode of the placeholders' own fakes, which keeps Dynamo's symbols.
    The Program's placeholders keep Dynamo's order; `meta[DYNAMO_INDEX]` remembers it.

    Raises:
        CaptureError: the graph has no tensor input.
    """
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    graph_module = copy_graph(graph_module)
    placeholders = list(graph_module.graph.find_nodes(op="placeholder"))
    fakes = [n.meta["example_value"] for n in placeholders]
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:
        raise CaptureError("the graph has no tensor input: nothing to quantize")
    baked = _bake_scalars(graph_module, placeholders, example_inputs)
    with torch.fx.traceback.preserve_node_meta(), mode, _quiet():
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


def _parameter_names(module: nn.Module, count: int) -> list[str]:
    return list(inspect.signature(module.forward).parameters)[:count]


@contextlib.contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """A decoder is captured without its key/value cache: state would only be an extra output."""
    config = getattr(module, "config", None)
    if config is None or not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frontends warn about their own internals
        yield
