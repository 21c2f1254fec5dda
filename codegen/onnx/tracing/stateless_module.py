"""A module without a KV cache (an encoder) as the file has it: its tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.tracing.signature import (
    BATCH,
    SEQUENCE,
    ReferenceCall,
    Signature,
    TensorSignature,
    TracedModule,
)


class StatelessModule(TracedModule):
    """A module without a cache.

    Args:
        model: any module that returns tensors.
        example: its keyword arguments, or its one positional argument.

    Attributes:
        has_dynamic_length: whether the traced graph takes texts of any length; see `note_dynamic_length`.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_keywords = isinstance(example, dict)
        self.example = dict(example) if self.takes_keywords else {"input": example}
        with torch.no_grad():
            outputs = self._named_outputs(*self.example.values())
        self.signature = Signature(
            inputs=[
                TensorSignature(name, {0: BATCH, 1: SEQUENCE} if value.ndim == 2 else {0: BATCH})
                for name, value in self.example.items()
            ],
            outputs=[TensorSignature(name, {}) for name in outputs],
        )
        self.has_dynamic_length = False

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Every tensor that the module returns."""
        return tuple(self._named_outputs(*values).values())

    def _named_outputs(self, *values: Tensor) -> dict[str, Tensor]:
        """The module's tensors by its own names for them; `output`, `output_1` .. if it has none."""
        named = dict(zip(self.example, values, strict=True))
        out = self.model(**named) if self.takes_keywords else self.model(*values)
        if isinstance(out, Mapping):
            return {name: part for name, part in out.items() if isinstance(part, Tensor)}
        parts = [part for part in ((out,) if isinstance(out, Tensor) else out) if isinstance(part, Tensor)]
        return {f"output_{i}" if i else "output": part for i, part in enumerate(parts)}

    def sample_inputs(self) -> tuple[Any, ...]:
        """The example, with a batch of at least two."""
        return tuple(torch.cat([v, v]) if v.shape[0] == 1 else v for v in self.example.values())

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """What torch.export may keep dynamic: batch, and length of texts."""
        auto = torch.export.Dim.AUTO
        return (tuple({axis: auto for axis in tensor.axes} for tensor in self.signature.inputs),)

    def flatten(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        """The arguments themselves."""
        return list(arguments)

    def flat_dynamic_shapes(self) -> list[Any]:
        """Of each argument."""
        return list(self.dynamic_shapes()[0])

    def reference_calls(self) -> list[ReferenceCall]:
        """The example, its first row, and, if the length of texts is dynamic, a shorter text."""
        whole = self.sample_inputs()
        calls = [self.call(whole), self.call(tuple(v[:1] for v in whole))]
        if self.has_dynamic_length:
            shorter = tuple(v[:, : max(2, v.shape[1] // 2)] if v.ndim == 2 else v for v in whole)
            calls.append(self.call(shorter))
        return calls

    def note_dynamic_length(self, fake_inputs: list[Any]) -> None:
        """Set `has_dynamic_length` from the fake values of a traced graph's inputs."""
        texts = [value for value in fake_inputs if value.ndim == 2]
        dynamic = all(isinstance(value.shape[1], torch.SymInt) and not value.is_floating_point() for value in texts)
        self.has_dynamic_length = bool(texts) and dynamic
