"""Hand a graph to Inductor: weights marked as static, CUDA graphs as requested, first caches made contiguous.

A CUDA graph reads the addresses that it was recorded with, so Inductor copies every input to memory of its own before
each replay, but for those known to be static. Dynamo knows that of parameters; that packed weights are static only we
know, and copying them would cost as much as multiplying by them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.aten_ops import aten

GRAPHS = "triton.cudagraphs"
MODES = ("default", "reduce-overhead")


def patches_of(mode: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options of a mode, with what the user gave besides.

    Args:
        mode: "default", or "reduce-overhead": CUDA graphs, as torch.compile's own mode of this name.
        given: options of Inductor.

    Returns:
        Option -> value.

    Raises:
        ValueError: another mode, or one that `given` contradicts.
    """
    if mode not in MODES:
        raise ValueError(
            f"mode={mode!r} is unknown. Fix: use {' or '.join(map(repr, MODES))}; options of Inductor's autotuning go "
            "into options={'inductor': {...}}, and `qcompile kernels tune` measures our kernels"
        )
    found = torch._inductor.list_mode_options(mode) | dict(given)
    if mode == "reduce-overhead" and not found[GRAPHS]:
        raise ValueError(
            f"mode='reduce-overhead' is CUDA graphs, and 'inductor' sets {GRAPHS} to False. Fix: give one of them"
        )
    return found


def compile_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], static: Sequence[int] | None = None
) -> Callable[..., Any]:
    """Compile a graph.

    Args:
        graph_module: ATen.
        inputs: fake or real, one for each placeholder.
        patches: options of Inductor.
        static: placeholders whose tensors keep their addresses between calls; None relies on Dynamo's marks.

    Returns:
        The compiled function, which takes the placeholders' values.

    Warns:
        UserWarning: CUDA graphs were requested, and Inductor runs this graph without one.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx as inductor

    def inner(traced: fx.GraphModule, examples: Sequence[Any], **config: Any) -> Any:
        if static is not None:
            own = len(examples) - len(inputs)  # constants of the graph itself come first
            config["static_input_idxs"] = [*range(own), *(own + place for place in static)]
        return inductor.compile_fx_inner(traced, examples, **config)

    _make_first_caches_contiguous(graph_module.graph)
    graph_module.recompile()
    skipped = counters["inductor"]["cudagraph_skips"]
    with _known_floats(inputs):
        compiled: Any = inductor.compile_fx(
            graph_module, list(inputs), inner_compile=inner, config_patches=dict(patches) or None
        )
    if patches.get(GRAPHS) and counters["inductor"]["cudagraph_skips"] > skipped:
        warnings.warn(
            "qcompile: Inductor runs a graph without a CUDA graph, though they were requested; "
            "TORCH_LOGS=cudagraphs says why",
            stacklevel=2,
        )
    made: Callable[..., Any] = compiled
    return made


def _make_first_caches_contiguous(graph: fx.Graph) -> None:
    """Write a cat of one tensor and empty ones as the contiguous copy that it is, in place.

    A cache begins so: cat([empty, keys]). Inductor (torch 2.13) gives it the strides of the keys, heads behind tokens,
    where eager PyTorch and the cat of the next token are contiguous. The graph for a second token would be compiled for
    strides that the cache of a third token does not have, and be compiled again: a minute for a small LLM.
    """
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        made, parts = node.meta.get("val"), node.args[0] if node.args else ()
        kept = [part for part in parts if not _is_empty(part.meta.get("val"))]
        if made is None or len(kept) != 1 or len(parts) == 1:
            continue
        if kept[0].meta["val"].dtype == made.dtype and made.is_contiguous():
            with graph.inserting_before(node):
                copy = graph.call_function(aten.clone.default, (kept[0],), {"memory_format": torch.contiguous_format})
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy)
            graph.erase_node(node)


def _is_empty(value: Any) -> bool:
    """An empty vector, which `cat` omits whatever the shape of the others."""
    return isinstance(value, Tensor) and value.ndim == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0


def make_floats_constant(graph_module: fx.GraphModule) -> None:
    """Let Dynamo trace once more if a Python float is an input of its graph, as with `dynamic=True`: a constant then.

    AOTAutograd asks for the same of floats that no tensor operator reads, which is all of them, since capture_dynamo
    makes them constants; but it asks behind all of our work, which would be done twice.

    Raises:
        TensorifyScalarRestartAnalysis: which Dynamo expects of a backend.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    if _specialize_floats([node.meta.get("example_value") for node in graph_module.graph.find_nodes(op="placeholder")]):
        raise TensorifyScalarRestartAnalysis


@contextlib.contextmanager
def _known_floats(inputs: Sequence[Any]) -> Iterator[None]:
    """Tell AOTAutograd that floats of Dynamo's graph are constants, as they are here.

    Dynamo told it so while it compiled; a graph that is compiled again, for other weights, is compiled without Dynamo.
    """
    from torch._dynamo.symbolic_convert import TensorifyState

    new = _specialize_floats(inputs)
    try:
        yield
    finally:
        TensorifyState.force_specializations.difference_update(new)


def _specialize_floats(fakes: Sequence[Any]) -> list[str]:
    """Mark the floats of fake tensors' symbols as constants. Returns those that were not."""
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    mode = next((fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")), None)
    symbols = getattr(getattr(mode, "shape_env", None), "backed_var_to_val", {})
    floats = [str(symbol) for symbol in symbols if symbol_is_type(symbol, SymT.FLOAT)]
    new = [name for name in floats if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    return new


def needs_gpu(inputs: Sequence[Any]) -> str | None:
    """Why CUDA graphs cannot be had for a graph that reads parameters; None if they can, or if it reads none."""
    devices = {t.device.type for t in inputs if isinstance(t, Tensor)}
    if "cuda" in devices or not any(isinstance(t, torch.nn.Parameter) for t in inputs):
        return None
    return f"CUDA graphs need a GPU, and the model is on the {', '.join(sorted(devices))}. Fix: drop the mode or option"
