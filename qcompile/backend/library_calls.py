"""A program compiled ahead of time in parts: a library for each kind of block, called once for each block.

The calls are made in C++ (codegen/cpu/native/library_calls.h): from Python a program is one call. Weights are inputs of
the libraries, so that equal blocks share one.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.backend.ahead_of_time import CompiledGraph
from qcompile.backend.blocked_graph import BlockedGraph, cut_graph, example_layout
from qcompile.codegen.cpu.native_kernels import load_native_kernels
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program

CompileOne = Callable[[Program, Mapping[str, Any]], CompiledGraph]


class OtherStrides(Exception):
    """A compiled part gives a value with other strides than those for which its readers are compiled."""


def cut_program(program: Program) -> BlockedGraph | None:
    """Cut a program into blocks and what is around them.

    Args:
        program: as lowered; its inputs are tensors. The fake values of its weights become those of what they are.

    Returns:
        As cut_graph: None where nothing is repeated.
    """
    for node in program.placeholders:
        if WEIGHT in node.meta:  # a pass may have given it other strides than it was traced with
            node.meta["val"] = program.fake_mode.from_tensor(program.weight_of(node), static_shapes=True)
    return cut_graph(program.graph_module, own_sizes=True)


def compile_calls(
    program: Program,
    blocked: BlockedGraph,
    inputs: Sequence[Tensor],
    settings: Mapping[str, Any],
    compile_one: CompileOne,
) -> Callable[[list[Tensor]], list[Tensor]]:
    """Compile the parts of a program and load them into this process.

    Args:
        program: as lowered.
        blocked: what cut_program made of it.
        inputs: of the example.
        settings: options of Inductor.
        compile_one: `compile_ahead`.

    Returns:
        A function of the program's inputs. It keeps the weights, and reads them where they are.

    Raises:
        OtherStrides: a part gives strides that its readers do not expect.
        Exception: whatever Inductor and the C++ compiler raise.
    """
    parts = [compile_one(Program(graph, {}), settings) for graph in blocked.graphs]
    _check_strides(program, blocked, [part.open() for part in parts], inputs)
    return _open(plan_calls(program, blocked), parts)


@dataclass(frozen=True)
class CallPlan:
    """What the C++ needs to know: values by place, the caller's first, then constants, then what calls give.

    Attributes:
        constants: weights, and constants of the graph.
        inputs: how many values the caller gives.
        values: how many there are in all.
        calls: four lists for each call: its graph, places that it reads, that it gives, that nobody reads behind it.
        results: places.
    """

    constants: list[Tensor]
    inputs: int
    values: int
    calls: list[list[int]]
    results: list[int]


def plan_calls(program: Program, blocked: BlockedGraph) -> CallPlan:
    """The calls of a program, whose weights are constants."""
    nodes = program.placeholders
    own = [place for place, node in enumerate(nodes) if WEIGHT in node.meta]
    given = [place for place, node in enumerate(nodes) if WEIGHT not in node.meta]
    moved = {old: new for new, old in enumerate([*given, *own])}

    def places(found: Sequence[int]) -> list[int]:
        return [moved.get(place, place) for place in found]

    calls = [
        part for call in blocked.calls for part in ([call.graph], *map(places, (call.inputs, call.outputs, call.dead)))
    ]
    constants = [program.weight_of(nodes[place]) for place in own] + blocked.constants
    return CallPlan(constants, len(given), len(blocked.values), calls, places(blocked.results))


def _open(plan: CallPlan, parts: Sequence[CompiledGraph]) -> Callable[[list[Tensor]], list[Tensor]]:
    from torch.export.pt2_archive._package import package_pt2  # imports triton

    load_native_kernels()
    files: dict[str, Any] = {f"part_{index}": [str(file) for file in part.files] for index, part in enumerate(parts)}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "parts.pt2")
        package_pt2(path, aoti_files=files)
        found: Any = torch.classes.qcompile_cpu.LibraryCalls(
            path, list(files), plan.constants, plan.inputs, plan.values, plan.calls, plan.results
        )
    run: Callable[[list[Tensor]], list[Tensor]] = found.run
    return run


def _check_strides(
    program: Program, blocked: BlockedGraph, runs: Sequence[Callable[[list[Any]], list[Any]]], inputs: Sequence[Tensor]
) -> None:
    """Compare what the parts give with what their readers were compiled for, on the example."""

    def checked(index: int, given: list[Any]) -> list[Any]:
        nodes = blocked.graphs[index].graph.find_nodes(op="placeholder")
        for node, value in zip(nodes, given, strict=True):
            if example_layout(value) != example_layout(node.meta["val"]):
                raise OtherStrides(f"{value.shape} with strides {value.stride()}; its reader has {node.meta['val']}")
        return runs[index](given)

    blocked.run([functools.partial(checked, index) for index in range(len(runs))], program.bind(inputs))
