"""What a recipe's cache needs beside the weights, as submodules, so that checkpoints carry it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "qcompile_prefix"  # the submodule that holds the prefix
CENTERS = "qcompile_centers"  # the one that holds the mean keys
SCALES = "qcompile_scales"  # and the one that holds fixed scales


class Prefix(nn.Module):
    """Float keys and values [1, H, p, D] of every layer, and logits [1, p, V], of `ids` [p]."""

    ids: Tensor
    logits: Tensor

    def __init__(self, ids: Tensor, layers: list[tuple[Tensor, Tensor]], logits: Tensor) -> None:
        super().__init__()
        self.layers = len(layers)
        self.register_buffer("ids", ids)
        self.register_buffer("logits", logits)
        for index, (keys, values) in enumerate(layers):
            self.register_buffer(f"keys{index}", keys)
            self.register_buffer(f"values{index}", values)

    def starts(self, ids: Tensor) -> bool:
        """Whether every row of ids [B, T] begins with the prefix and goes on."""
        p = len(self.ids)
        return ids.ndim == 2 and ids.shape[1] > p and bool((ids[:, :p] == self.ids).all())

    def caches(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer for a batch."""
        return tuple(
            [getattr(self, f"{part}{i}").expand(rows, -1, -1, -1) for i in range(self.layers)]
            for part in ("keys", "values")
        )

    @staticmethod
    def empty(shapes: Mapping[str, list[int]]) -> Prefix:
        """A prefix of the right shapes, for loading."""
        count = len(shapes) // 2 - 1
        layers = [(torch.empty(shapes[f"keys{i}"]), torch.empty(shapes[f"values{i}"])) for i in range(count)]
        return Prefix(torch.empty(shapes["ids"], dtype=torch.int64), layers, torch.empty(shapes["logits"]))


class Centers(nn.Module):
    """The mean key [H, D] of every layer."""

    def __init__(self, centers: Sequence[Tensor]) -> None:
        super().__init__()
        for index, center in enumerate(centers):
            self.register_buffer(f"center{index}", center)

    @property
    def all(self) -> list[Tensor]:
        """Layer by layer."""
        return [getattr(self, f"center{index}") for index in range(len(self._buffers))]


class Scales(nn.Module):
    """Fixed scales of the cached keys and values [H, D] of every layer."""

    def __init__(self, scales: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        for index, (keys, values) in enumerate(scales):
            self.register_buffer(f"keys{index}", keys)
            self.register_buffer(f"values{index}", values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        result = super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:  # a cast: scales stay float32
                self._buffers[name] = old.to(new.device)
        return result

    @property
    def all(self) -> list[tuple[Tensor, Tensor]]:
        """Layer by layer."""
        return [(getattr(self, f"keys{i}"), getattr(self, f"values{i}")) for i in range(len(self._buffers) // 2)]

    @staticmethod
    def empty(shapes: Mapping[str, list[int]]) -> Scales:
        """Of the right shapes, for loading."""
        tensors = [torch.empty(shape) for shape in shapes.values()]
        return Scales(list(zip(tensors[::2], tensors[1::2], strict=True)))
