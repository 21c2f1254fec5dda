"""The longest text that a model reads at once, as its config, its tokenizer or its tables of positions say.

Beyond it a table of learned positions ends in an IndexError, and rotary positions in values that no training has seen.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# What configs of transformers call it, in the order of trust.
_NAMES = (
    "max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length", "max_seq_len", "n_ctx",
    "seq_length",
)  # fmt: skip
_NO_LIMIT = 10**9  # tokenizers without a limit say 10^30


def context_length(model: Any = None, tokenizer: Any = None) -> int | None:
    """The tokens that a model reads at once; None where nothing says.

    Args:
        model: of transformers, or a session of an exported folder; another module says nothing.
        tokenizer: its `model_max_length` counts where the model says nothing.
    """
    limit = _of_config(getattr(model, "config", None)) or _limit(getattr(model, "max_length", None))
    if limit is not None and isinstance(model, nn.Module):
        limit = _less_padding(model, limit)
    return limit or _limit(getattr(tokenizer, "model_max_length", None))


def within_context(length: int, model: Any = None, tokenizer: Any = None) -> int:
    """`length`, or the context of the model where that is less."""
    limit = context_length(model, tokenizer)
    return length if limit is None else min(length, limit)


def _of_config(config: Any) -> int | None:
    """The limit of a config, or of the part of it that is about text."""
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "decoder", "llm_config"))]
    found = (_limit(getattr(part, name, None)) for part in parts for name in _NAMES)
    return next((limit for limit in found if limit is not None), None)


def _limit(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < _NO_LIMIT else None


def _less_padding(model: nn.Module, limit: int) -> int:
    """How far positions reach in a table that has a padding row: they are counted from behind it."""
    words_of: Any = getattr(model, "get_input_embeddings", lambda: None)
    words = words_of()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings == limit:
            return limit - (-1 if module.padding_idx is None else module.padding_idx) - 1
    return limit
