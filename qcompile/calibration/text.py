"""Text for calibration and evaluation, and the English that every Python installation carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def embedded_text() -> str:
    """0.7 MB of English prose: the language reference in the standard library's pydoc topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path | None = None) -> str:
    """A text file, or the embedded text without a path."""
    return embedded_text() if path is None else Path(path).read_text(encoding="utf-8")


def windows(tokenizer: Any, text: str, *, length: int = 2048, count: int = 4, skip: int = 0) -> list[Tensor]:
    """The text as one token stream, cut into [1, length] windows (the GPTQ protocol).

    Args:
        tokenizer: of transformers. text: joined text. length, count: windows and their tokens.
        skip: windows to leave out first, so that calibration and evaluation do not overlap.

    Raises:
        ValueError: the text is too short.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    have = ids.numel() // length
    if have < skip + count:
        raise ValueError(
            f"the text gives {have} windows of {length} tokens, {skip + count} are needed: "
            "give more text or fewer windows"
        )
    return [ids[(skip + i) * length : (skip + i + 1) * length][None] for i in range(count)]


def batches(
    tokenizer: Any, path: str | Path | None = None, *, length: int = 512, count: int = 16
) -> list[dict[str, Tensor]]:
    """Calibration batches: `count` windows of `length` tokens from the end of the text.

    The end, because evaluation reads from the beginning. Deterministic.
    """
    ids = torch.tensor(tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"])
    count = min(count, ids.numel() // length)
    if not count:
        raise ValueError(f"the text has {ids.numel()} tokens, one window needs {length}: give more text")
    tail = ids[ids.numel() - count * length :]
    return [{"input_ids": window[None]} for window in tail.split(length)]


def sentences(path: str | Path | None = None, *, count: int = 64) -> list[str]:
    """Sentences of 40 to 200 characters from all over a text (the embedded one without a path). Deterministic.

    Raises:
        ValueError: the text has none.
    """
    every = [s for s in read_text(path).replace("\n", " ").split(". ") if 40 < len(s) < 200]
    if not every:
        raise ValueError("the text has no sentence of 40 to 200 characters: give more text")
    return every[:: max(1, len(every) // count)][:count]


def sentence_batches(tokenizer: Any, chosen: list[str], *, size: int = 16) -> list[dict[str, Tensor]]:
    """What an encoder takes: `size` sentences a batch, padded to one length, with attention_mask [B, T].

    Raises:
        ValueError: the tokenizer cannot pad.
    """
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has no padding token, and texts of a batch differ in length: set its pad_token")
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    # Padding in front would leave tokens that see nothing, if a model looks back only.
    config = dict(padding=True, padding_side="right", truncation=True, return_tensors="pt")
    return [dict(tokenizer(group, **config)) for group in groups]
