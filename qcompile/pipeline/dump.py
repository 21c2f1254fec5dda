"""Write the graph before and after every pass to a folder: the way to debug a pass.

00-captured.txt     one node a line: name, dtype and shape, operator, arguments
01-untie.txt        after the first pass
01-untie.diff       what it changed, as a unified diff
..
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qcompile.ir.program import Program


class GraphDump:
    """Writes the graphs of one run.

    Attributes:
        folder: of the files.
        count: passes that were written.
        lines: the graph that was written last, one node a line.
    """

    def __init__(self, folder: str | Path, program: Program) -> None:
        """Write the captured graph.

        Args:
            folder: made if it does not exist.
            program: as captured.

        Raises:
            OSError: the folder cannot be made.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.lines = graph_lines(program)
        self._write("captured", ".txt", self.lines)

    def write(self, name: str, program: Program) -> None:
        """Write the graph after the pass `name`, and its difference from the graph before."""
        self.count += 1
        before, self.lines = self.lines, graph_lines(program)
        self._write(name.lower(), ".txt", self.lines)
        difference = difflib.unified_diff(before, self.lines, "before", f"after {name}", lineterm="", n=2)
        self._write(name.lower(), ".diff", list(difference))

    def _write(self, name: str, suffix: str, lines: list[str]) -> None:
        path = self.folder / f"{self.count:02d}-{name}{suffix}"
        path.write_text("\n".join(lines) + "\n" if lines else "")


def graph_lines(program: Program) -> list[str]:
    """A program as text, one node a line."""
    lines = []
    for node in program.graph.nodes:
        value = _describe(node.meta.get("val"))
        if node.op == "placeholder":
            name = program.weight_name(node)
            lines.append(f"{node.name}: {value} = {'input' if name is None else 'weight ' + name}")
        elif node.op == "output":
            lines.append(f"return {_arguments(node.args, {})}")
        else:
            lines.append(f"{node.name}: {value} = {_operator(node)}({_arguments(node.args, node.kwargs)})")
    return lines


def _operator(node: fx.Node) -> str:
    return str(node.target) if not callable(node.target) or hasattr(node.target, "_schema") else node.target.__name__


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    parts = [str(a) for a in args] + [f"{name}={value}" for name, value in kwargs.items()]
    return ", ".join(parts)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return type(value).__name__
