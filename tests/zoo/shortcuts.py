"""What saves most of the time of a run over many architectures and changes no result: one export, no Inductor."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.backend import decode_step, dynamo
from qcompile.ir.program import Program, copy_graph


@contextlib.contextmanager
def without_inductor() -> Iterator[None]:
    """The backend's graphs run as they are lowered; Inductor's own compile of each takes most of the time."""
    before = dynamo.compile_graph, decode_step.compile_ahead
    dynamo.compile_graph = lambda graph_module, *_: graph_module
    decode_step.compile_ahead = lambda program, _: _AsLowered(program)
    try:
        yield
    finally:
        dynamo.compile_graph, decode_step.compile_ahead = before


class _AsLowered:
    """In place of a compiled graph: the graph."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def open(self) -> Callable[[list[Tensor]], list[Tensor]]:
        """What runs it."""
        return lambda inputs: self.program(*inputs)


@contextlib.contextmanager
def one_export() -> Iterator[None]:
    """Modules of equal parameters and inputs are exported once: a new graph each time, of the first one's nodes."""
    export: Any = torch.export.export
    known: dict[Any, Any] = {}

    def key(value: Any) -> Any:
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value

    def exported(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, **options: Any) -> Any:
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        kinds = [type(child).__qualname__ for child in module.modules()]
        given = torch.utils._pytree.tree_map(key, (args, kwargs, options, sorted(state.items()), kinds))
        name = str(given)
        if name not in known:
            try:
                known[name] = export(module, args, kwargs, **options)
            except Exception as error:
                known[name] = error
        found = known[name]
        if isinstance(found, Exception):
            raise found
        copied = copy.copy(found)
        copied._graph_module = copy_graph(found.graph_module)
        return copied

    torch.export.export = exported
    try:
        yield
    finally:
        torch.export.export = export
