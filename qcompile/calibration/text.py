"""Text for calibration and evaluation, and the English prose that every Python installation carries."""

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
    """Cut a text, as one stream of tokens, into windows (the GPTQ protocol).

    Args:
        tokenizer: of transformers.
        text: the text.
        length: tokens of a window.
        count: windows.
        skip: windows to omit first, so that calibration and evaluation do not overlap.

    Returns:
        Token ids [1, length] each.

    Raises:
        ValueError: the text is too short.
    """
    ids = _tokens(tokenizer, text)
    available = ids.numel() // length
    if available < skip + count:
        raise ValueError(
            f"the text gives {available} windows of {length} tokens, {skip + count} are needed. "
            "Fix: give more text or fewer windows"
        )
    return [ids[(skip + i) * length : (skip + i + 1) * length][None] for i in range(count)]


def batches(
    tokenizer: Any, path: str | Path | None = None, *, length: int = 512, count: int = 16
) -> list[dict[str, Tensor]]:
    """Calibration batches: windows from the end of a text, because evaluation reads from the beginning. Deterministic.

    Args:
        tokenizer: of transformers.
        path: a text file; None for the embedded text.
        length: tokens of a window.
        count: windows at most.

    Returns:
        {"input_ids": [1, length]} each.

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids = _tokens(tokenizer, read_text(path))
    count = min(count, ids.numel() // length)
    if not count:
        raise ValueError(f"the text has {ids.numel()} tokens, one window needs {length}. Fix: give more text")
    tail = ids[ids.numel() - count * length :]
    return [{"input_ids": window[None]} for window in torch.split(tail, length)]


def sentences(path: str | Path | None = None, *, count: int = 64) -> list[str]:
    """Sentences of 40 to 200 characters from all over a text. Deterministic.

    Args:
        path: a text file; None for the embedded text.
        count: sentences at most.

    Raises:
        ValueError: the text has none.
    """
    every = [s for s in read_text(path).replace("\n", " ").split(". ") if 40 < len(s) < 200]
    if not every:
        raise ValueError("the text has no sentence of 40 to 200 characters. Fix: give more text")
    return every[:: max(1, len(every) // count)][:count]


def sentence_batches(tokenizer: Any, chosen: list[str], *, size: int = 16) -> list[dict[str, Tensor]]:
    """Calibration batches of an encoder: sentences, padded to one length.

    Args:
        tokenizer: of transformers.
        chosen: the sentences.
        size: sentences of a batch.

    Returns:
        What the tokenizer gives: input_ids, attention_mask [B, S] and so on.

    Raises:
        ValueError: the tokenizer cannot pad.
    """
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no padding token, and texts of a batch differ in length. Fix: set pad_token"
        )
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    # Padding in front would leave tokens that attend to nothing, in a model that looks back only.
    options = dict(padding=True, padding_side="right", truncation=True, return_tensors="pt")
    return [dict(tokenizer(group, **options)) for group in groups]


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
