"""Which layers of a cache hold the state of a convolution or of a recurrence, as those of hybrid models do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def recurrent_layers(layers: Sequence[Any]) -> dict[int, str]:
    """Index -> class name of the layers of a transformers cache that hold more than keys and values."""
    return {index: type(layer).__name__ for index, layer in enumerate(layers) if hasattr(layer, "conv_states")}
