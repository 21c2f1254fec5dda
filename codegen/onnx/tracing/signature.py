"""What an exported model takes and returns: names and dynamic axes, and the interface of a module that is exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"

ReferenceCall = tuple[tuple[Any, ...], list[Tensor]]
"""Arguments of a call, and the flat list of tensors that the module returns for them."""


@dataclass
class TensorSignature:
    """An input or an output of the file.

    Attributes:
        name: in the file.
        axes: the sizes that are not those of the traced example: axis -> name of a dynamic size, or a fixed size.
    """

    name: str
    axes: dict[int, str | int]


@dataclass
class Signature:
    """Inputs and outputs of the file, in its order."""

    inputs: list[TensorSignature]
    outputs: list[TensorSignature]

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs."""
        return [tensor.name for tensor in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs."""
        return [tensor.name for tensor in self.outputs]


class TracedModule(nn.Module, ABC):
    """A model wrapped so that it takes and returns what the file does.

    Attributes:
        model: the model.
        signature: of the file.
        rounds_cache: whether an int8 KV cache is rounded when the module runs; without one it says nothing.
    """

    model: nn.Module
    signature: Signature
    rounds_cache = False

    @abstractmethod
    def sample_inputs(self) -> tuple[Any, ...]:
        """Arguments to trace with."""

    @abstractmethod
    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The sizes that torch.export keeps dynamic, in the structure of `sample_inputs`."""

    @abstractmethod
    def flatten(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        """Arguments in the order of the file's inputs."""

    @abstractmethod
    def flat_dynamic_shapes(self) -> list[Any]:
        """Dynamic shapes in the order of the file's inputs."""

    @abstractmethod
    def reference_calls(self) -> list[ReferenceCall]:
        """Calls that the file is verified with."""

    def call(self, arguments: tuple[Any, ...]) -> ReferenceCall:
        """Arguments and what the module returns for them."""
        return arguments, torch.utils._pytree.tree_leaves(self(*arguments))
