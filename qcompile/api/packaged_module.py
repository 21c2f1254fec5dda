"""Any module as one compiled graph: what its call takes and gives back, as plain data of a package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.call_tree import CallTree, map_leaves, shape_of
from qcompile.ir.program import Program

Graph = Callable[[list[Tensor]], list[Tensor]]


class NamedOutputs(dict[str, Tensor]):
    """Tensors by name, as attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None


def describe_call(model: nn.Module, call: CallTree, program: Program, output: Any) -> dict[str, Any]:
    """What a packaged module's call takes and gives.

    Args:
        model: what was captured.
        call: the arguments of the example.
        program: captured from it, with its dynamic sizes.
        output: of the model for the example.

    Returns:
        Plain data, for PackagedModule.
    """
    inputs = []
    for path, node in zip(call.tensors, program.inputs, strict=True):
        value = node.meta["val"]
        sizes = [_size(size) for size in value.shape]
        inputs.append({"path": path, "dtype": str(value.dtype).removeprefix("torch."), "sizes": sizes})
    names: list[str] = []
    map_leaves(output, lambda path, leaf: names.append(path) if isinstance(leaf, Tensor) else leaf)
    kind = "tensor" if isinstance(output, Tensor) else "tuple" if type(output) in (tuple, list) else "names"
    return {
        "parameters": [name for name in inspect.signature(model.forward).parameters if name != "self"],
        "inputs": inputs,
        "constants": {path: repr(value) for path, value in call.constants.items()},
        "outputs": {"kind": kind, "names": names},
    }


def _size(size: int | torch.SymInt) -> int | str:
    """A size that is one number, or the name of one that may be any."""
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return str(size) if fixed is None else fixed


class PackagedModule:
    """A compiled graph that is called as the module that it was made from.

    Attributes:
        description: what it takes and gives.
        tokenizer: of transformers; None for none.
    """

    tokenizer: Any = None

    def __init__(self, graph: Graph, description: Mapping[str, Any]) -> None:
        self.description, self._graph = description, graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Args:
            args: as the example's, by position.
            kwargs: as the example's, by name.

        Returns:
            A tensor, a tuple of tensors, or tensors by name, as the module gives them.

        Raises:
            ValueError: arguments, dtypes or shapes that the graph was not compiled for.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        call = CallTree(args, given, tuple(self.description["parameters"]))
        inputs = self._inputs(call)
        with torch.no_grad():
            found = self._graph(inputs)
        outputs = self.description["outputs"]
        if outputs["kind"] == "tensor":
            return found[0]
        return tuple(found) if outputs["kind"] == "tuple" else NamedOutputs(zip(outputs["names"], found, strict=True))

    def _inputs(self, call: CallTree) -> list[Tensor]:
        tensors, planned = call.tensors, self.description["inputs"]
        paths = [entry["path"] for entry in planned]
        if set(tensors) != set(paths):
            raise ValueError(f"the package takes {', '.join(paths)}, got {', '.join(tensors) or 'no tensor'}")
        constants = {path: repr(value) for path, value in call.constants.items()}
        for path, value in constants.items():
            if self.description["constants"].get(path) != value:
                raise ValueError(
                    f"{path}={value} is not what the package was made with "
                    f"({self.description['constants'].get(path, 'nothing')}). Fix: package the model with this example"
                )
        known: dict[str, int] = {}
        for entry in planned:
            _check(tensors[entry["path"]], entry, known)
        return [tensors[path].detach().contiguous() for path in paths]


def _check(tensor: Tensor, entry: Mapping[str, Any], known: dict[str, int]) -> None:
    """Refuse a tensor that the graph was not compiled for; sizes of the same name are the same."""
    sizes: Sequence[int | str] = entry["sizes"]
    expected = [size if isinstance(size, int) else known.get(size, size) for size in sizes]
    fits = len(sizes) == tensor.ndim and str(tensor.dtype) == f"torch.{entry['dtype']}" and tensor.device.type == "cpu"
    if not fits or any(isinstance(e, int) and e != n for e, n in zip(expected, tensor.shape, strict=True)):
        raise ValueError(
            f"{entry['path']} is {shape_of(tensor)} on {tensor.device}, and the package takes {entry['dtype']} "
            f"[{', '.join(map(str, expected))}] on the CPU. Fix: give that, or package the model with this example"
        )
    known.update({size: n for size, n in zip(sizes, tensor.shape, strict=True) if isinstance(size, str)})
