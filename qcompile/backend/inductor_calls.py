"""A graph that Inductor compiles in parts: each kind of block once, called once for each block.

For graphs without gradients and with large M on a CPU: a call costs tens of microseconds, which a token would feel.
Under CUDA graphs the whole is one recording; without them a GPU would wait for the calls, each of which costs more than
a launch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing

from qcompile.backend.blocked_graph import BlockedGraph, Compiled, cut_graph, example_layout

LEAST_ROWS = 64
"""M of what blocks give to each other, at least: a graph for one token is compiled as a whole."""

CompileOne = Callable[[fx.GraphModule, Sequence[Any], Mapping[str, Any], Sequence[int]], Callable[..., Any]]


def compile_in_blocks(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    patches: Mapping[str, Any],
    static: Sequence[int],
    compile_one: CompileOne,
) -> Callable[..., Any]:
    """Compile a graph, its repeated block once.

    Args:
        module: ATen.
        inputs: fake, one for each placeholder.
        patches: options of Inductor.
        static: placeholders whose tensors keep their addresses between calls.
        compile_one: `compile_graph`.

    Returns:
        The compiled function, which takes the placeholders' values. The whole graph is compiled as one where nothing is
        repeated, where blocks read a small M, or where a part gives other strides than its readers were compiled for.
    """
    blocked = cut_graph(module) if _on_cpu(inputs) else None
    cut = blocked is not None and _has_large_m(blocked)
    parts = _compile_parts(blocked, patches, static, compile_one) if blocked is not None and cut else None
    if blocked is None or parts is None:
        return compile_one(module, inputs, patches, static)
    run, compiled = blocked.run, parts
    return lambda *given: run(compiled, given)


def _has_large_m(blocked: BlockedGraph) -> bool:
    """Whether all that blocks give to other calls has a large M, or a free one."""
    kinds = [call.graph for call in blocked.calls]
    given = {place for call in blocked.calls if kinds.count(call.graph) > 1 for place in call.outputs}
    read = {place for call in blocked.calls for place in call.inputs}
    shapes = [tuple(blocked.values[place].shape) for place in given & read]
    rows = [shape[:-1] for shape in shapes if not any(isinstance(n, int) and n == 0 for n in shape)]  # an empty cache
    return all(any(isinstance(n, torch.SymInt) for n in one) or math.prod(one) >= LEAST_ROWS for one in rows)


def _on_cpu(inputs: Sequence[Any]) -> bool:
    return all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor))


def _compile_parts(
    blocked: BlockedGraph, patches: Mapping[str, Any], static: Sequence[int], compile_one: CompileOne
) -> list[Compiled] | None:
    """One function for each graph; None if strides do not fit."""
    fixed = {*static, *range(blocked.inputs, blocked.inputs + len(blocked.constants))}
    parts = list[Compiled]()
    for index, graph in enumerate(blocked.graphs):
        call = next(call for call in blocked.calls if call.graph == index)
        examples = [blocked.values[place] for place in call.inputs]
        unmoved = [at for at, place in enumerate(call.inputs) if place in fixed]
        with _reported_strides(examples) as strides:
            parts.append(_of_list(compile_one(graph, examples, patches, unmoved)))
        given = [blocked.values[place] for place in call.outputs]
        for value, found in zip(given, strides, strict=bool(strides)):  # none where nothing was compiled
            if found is not None and example_layout(value) != example_layout(value, found):
                return None
    return parts


def _of_list(compiled: Callable[..., Any]) -> Compiled:
    return lambda given: compiled(*given)


@contextlib.contextmanager
def _reported_strides(examples: Sequence[Any]) -> Iterator[list[tuple[int, ...] | None]]:
    """What Inductor says of the results of what it compiles here: their strides in the example."""
    mode = next(value.fake_mode for value in examples if hasattr(value, "fake_mode"))
    with tracing(TracingContext.try_get() or TracingContext(mode)), TracingContext.report_output_strides() as strides:
        assert strides is not None
        yield strides
