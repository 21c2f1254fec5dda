"""Compile a lowered program ahead of time, by AOTInductor: a library of C++ that reads the program's weights in place.

The weights are not inside of the library. Whoever loads it gives them, by name: several libraries read one copy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import is_non_overlapping_and_dense_or_false

from qcompile.ir.capture import quiet_frontends
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program, copy_graph

_NAME = "graph"
_SETTINGS = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
_DEFAULTS = {
    "aot_inductor.compile_wrapper_opt_level": "Og",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
"""The wrapper only calls, in one function of thousands of lines: docs/design/package.md says what each flag costs."""


@dataclass(frozen=True)
class CompiledGraph:
    """A library and what it reads.

    Attributes:
        files: the library, and its metadata (JSON); the names under which an archive holds them are theirs.
        weights: what it reads, by its own names.
    """

    files: tuple[Path, ...]
    weights: dict[str, Tensor]

    def archived(self, folder: str) -> str:
        """Write an archive that holds the library alone; returns its path."""
        from torch.export.pt2_archive._package import package_pt2  # imports triton

        path = str(Path(folder) / "graph.pt2")
        package_pt2(path, aoti_files={_NAME: [str(file) for file in self.files]})
        return path

    def open(self) -> Callable[[list[Tensor]], list[Tensor]]:
        """Load the library into this process; see open_graph."""
        with tempfile.TemporaryDirectory() as folder:
            return open_graph(self.archived(folder), _NAME, self.weights)


def compile_ahead(program: Program, settings: Mapping[str, Any] | None = None) -> CompiledGraph:
    """Compile a program.

    Args:
        program: as lowered; its inputs are tensors. Not changed.
        settings: options of Inductor.

    Returns:
        The files, in Inductor's cache: read them soon.

    Raises:
        Exception: whatever Inductor and the C++ compiler raise.
    """
    module, weights = _with_own_weights(program)
    examples = tuple(node.meta["val"] for node in program.inputs)
    with torch.no_grad(), quiet_frontends():
        files: Any = torch._inductor.aot_compile(
            module, examples, options={**_DEFAULTS, **(settings or {}), **_SETTINGS}
        )
    graph = CompiledGraph(tuple(Path(file) for file in files if str(file).endswith((".so", ".json"))), weights)
    with tempfile.TemporaryDirectory() as folder:
        read = _loader(graph.archived(folder), _NAME).get_constant_fqns()  # Inductor may need fewer than the graph has
    return CompiledGraph(graph.files, {name: weights[name] for name in read})


def open_graph(archive: str, name: str, weights: Mapping[str, Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Load a library of an archive (.pt2).

    Args:
        archive: the file.
        name: of the graph in it.
        weights: what it reads, by its own names; tensors of some size are read where they are. Keep them.

    Returns:
        A function of the inputs.

    Raises:
        RuntimeError: the library cannot be loaded.
    """
    loader = _loader(archive, name)
    loader.load_constants(dict(weights), False, True, True, False)
    run: Callable[[list[Tensor]], list[Tensor]] = loader.run
    return run


def _loader(archive: str, name: str) -> Any:
    return torch._C._aoti.AOTIModelPackageLoader(archive, name, False, 1, -1)


def _with_own_weights(program: Program) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The graph with its weights as attributes, in place of placeholders, and what the attributes hold."""
    module = copy_graph(program.graph_module)
    graph, weights = module.graph, dict[str, Tensor]()
    for index, node in enumerate(list(graph.find_nodes(op="placeholder"))):
        name = node.meta.get(WEIGHT)
        if name is None:
            continue
        attribute = f"weight_{index}"
        weights[attribute] = _dense(program.weights[name])
        module.register_buffer(attribute, weights[attribute])
        with graph.inserting_before(node):
            read = graph.get_attr(attribute)
        read.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):  # constants of the graph too
        tensor = getattr(module, str(node.target))
        if isinstance(tensor, Tensor):
            weights[str(node.target)] = tensor
    output = next(iter(graph.find_nodes(op="output")))
    found = output.args[0]
    output.args = (tuple(found) if isinstance(found, (list, tuple)) else (found,),)
    module.recompile()
    return module, weights


def _dense(weight: Tensor) -> Tensor:
    """A weight whose bytes are all its own, in whatever order of dimensions: what an archive can hold as it is."""
    return weight if is_non_overlapping_and_dense_or_false(weight) else weight.contiguous()
