"""What the zoo knows of one architecture, the sizes that most of them share, and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
PLAIN = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
ENCODER = {k: v for k, v in PLAIN.items() if k not in ("bos_token_id", "eos_token_id")}
SHAPE = {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")}
TOKENS = dict(vocab_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)

# Of a mixture of experts where a token of the examples goes to other experts: two scores of its router nearly equal.
ROUTED = {"int8": 0.3}


def ids() -> dict[str, Tensor]:
    """Two rows of eight tokens, none of them special."""
    return {"input_ids": torch.randint(3, 128, (2, 8))}


def pair_of_ids() -> dict[str, Tensor]:
    """For an encoder and for a decoder."""
    return {"input_ids": torch.randint(3, 128, (2, 8)), "decoder_input_ids": torch.randint(3, 128, (2, 5))}


def pixels() -> dict[str, Tensor]:
    """Two images of 32 x 32."""
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


@dataclass(frozen=True)
class Architecture:
    """A tiny random model.

    Attributes:
        make: the module, with random weights.
        inputs: keyword arguments of its forward, with two rows.
        generates: whether `generate` writes tokens.
        dynamic: whether it takes any length.
        options: keyword arguments of `generate` beside the inputs.
        bounds: of the relative error in a format, where the cause of a larger one is known.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]] = ids
    generates: bool = False
    dynamic: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)


def decoder(make: Callable[[], nn.Module]) -> Architecture:
    """A language model."""
    return Architecture(make, generates=True)
