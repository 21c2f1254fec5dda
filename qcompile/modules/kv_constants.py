"""What a quantized KV cache needs beside the weights, as submodules of the model, so that checkpoints carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qcompile.modules.fixed_dtype import FixedDtypeModule

# Names of the submodules.
PREFIX = "qcompile_prefix"
CENTERS = "qcompile_centers"
SCALES = "qcompile_scales"


class Prefix(nn.Module):
    """A prefix of tokens whose keys and values stay float (IntactKV).

    Attributes:
        ids: the tokens, int64 [P].
        logits: the model's logits of these tokens, [1, P, V].
        layers: the number of layers; their keys and values are the buffers keys0, values0, .. of [1, H, P, D].
    """

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
        """Whether every row of ids [B, S] begins with the prefix and is longer."""
        p = len(self.ids)
        return ids.ndim == 2 and ids.shape[1] > p and bool((ids[:, :p] == self.ids).all())

    def caches(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer, [B, H, P, D] with B = batch."""
        keys, values = (
            [self.get_buffer(f"{part}{i}").expand(batch, -1, -1, -1) for i in range(self.layers)]
            for part in ("keys", "values")
        )
        return keys, values

    @staticmethod
    def empty(shapes: Mapping[str, list[int]]) -> Prefix:
        """A prefix with unset buffers of the given shapes, for loading."""
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
        """The mean keys, layer by layer."""
        return [self.get_buffer(f"center{index}") for index in range(len(self._buffers))]

    @staticmethod
    def empty(shapes: Mapping[str, list[int]]) -> Centers:
        """Centers with unset buffers of the given shapes, for loading."""
        return Centers([torch.empty(shape) for shape in shapes.values()])


class Scales(FixedDtypeModule):
    """Static per-channel scales of the cached keys and values, float32 [H, D] of every layer."""

    def __init__(self, scales: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        for index, (keys, values) in enumerate(scales):
            self.register_buffer(f"keys{index}", keys)
            self.register_buffer(f"values{index}", values)

    @property
    def all(self) -> list[tuple[Tensor, Tensor]]:
        """Scales of keys and of values, layer by layer."""
        count = len(self._buffers) // 2
        return [(self.get_buffer(f"keys{i}"), self.get_buffer(f"values{i}")) for i in range(count)]

    @staticmethod
    def empty(shapes: Mapping[str, list[int]]) -> Scales:
        """Scales with unset buffers of the given shapes, for loading."""
        tensors = [torch.empty(shape) for shape in shapes.values()]
        return Scales(list(zip(tensors[::2], tensors[1::2], strict=True)))
