"""Text for calibration and evaluation, and the English prose that every Python installation carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calibration.context_length import context_length, within_context

CALIBRATION_LENGTH = 512  # tokens of a window, where the model reads as many


def embedded_text() -> str:
    """0.7 MB of English prose: the language reference in the standard library's pydoc topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path | None = None) -> str:
    """A text file, or the embedded text without a path.

    Raises:
        ValueError: there is no such file, or it is empty or no UTF-8 text.
    """
    if path is None:
        return embedded_text()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (at byte {error.start}). Fix: convert it") from None
    except OSError as error:
        raise ValueError(f"the text {path} cannot be read: {error.strerror}. Fix: check the path") from None
    if not text.strip():
        raise ValueError(f"the text {path} is empty. Fix: give another file")
    return text


def windows(tokenizer: Any, text: str, *, length: int = 2048, count: int = 4, skip: int = 0) -> list[Tensor]:
    """Cut a text, as one stream of tokens, into windows (the GPTQ protocol).

    Args:
        tokenizer: of transformers.
        text: the text.
        length: tokens of a window; a model may read fewer at once (context_length.py).
        count: windows.
        skip: windows to omit first, so that calibration and evaluation do not overlap.

    Returns:
        Token ids [1, length] each.

    Raises:
        ValueError: the text is too short, or no window of this length can be cut.
    """
    _check_window(length, count)
    if skip < 0:
        raise ValueError(f"skip={skip}: windows to omit are 0 or more")
    ids = _tokens(tokenizer, text)
    available = ids.numel() // length
    if available < skip + count:
        raise ValueError(
            f"the text gives {available} windows of {length} tokens, {skip + count} are needed. "
            "Fix: give more text or fewer windows"
        )
    return [ids[(skip + i) * length : (skip + i + 1) * length][None] for i in range(count)]


def batches(
    tokenizer: Any,
    path: str | Path | None = None,
    *,
    length: int | None = None,
    count: int = 16,
    text: str | None = None,
    model: nn.Module | None = None,
) -> list[dict[str, Tensor]]:
    """Calibration batches: windows from the end of a text, because evaluation reads from the beginning. Deterministic.

    Args:
        tokenizer: of transformers.
        path: a text file; None for the embedded text.
        length: tokens of a window; None for 512, or the model's context where that is less.
        count: windows at most.
        text: the text itself, in place of a path.
        model: whose context limits the default length; None: the tokenizer's limit is taken.

    Returns:
        {"input_ids": [1, length]} each.

    Raises:
        ValueError: the text is shorter than one window, or no window of this length can be cut.
    """
    if length is None:
        length = within_context(CALIBRATION_LENGTH, model, tokenizer)
    _check_window(length, count)
    ids = _tokens(tokenizer, read_text(path) if text is None else text)
    count = min(count, ids.numel() // length)
    if not count:
        raise ValueError(f"the text has {ids.numel()} tokens, one window needs {length}. Fix: give more text")
    tail = ids[ids.numel() - count * length :]
    return [{"input_ids": window[None]} for window in torch.split(tail, length)]


def _check_window(length: int, count: int) -> None:
    if length < 1 or count < 1:
        raise ValueError(f"length={length}, count={count}: a text is cut into 1 window or more, of 1 token or more")


def sentences(path: str | Path | None = None, *, count: int = 64, text: str | None = None) -> list[str]:
    """Sentences of 40 to 200 characters from all over a text. Deterministic.

    Args:
        path: a text file; None for the embedded text.
        count: sentences at most.
        text: the text itself, in place of a path.

    Raises:
        ValueError: the text has none.
    """
    whole = read_text(path) if text is None else text
    every = [s for s in whole.replace("\n", " ").split(". ") if 40 < len(s) < 200]
    if not every or count < 1:
        raise ValueError("the text has no sentence of 40 to 200 characters. Fix: give more text")
    return every[:: max(1, len(every) // count)][:count]


def sentence_batches(
    tokenizer: Any, chosen: list[str], *, size: int = 16, model: nn.Module | None = None
) -> list[dict[str, Tensor]]:
    """Calibration batches of an encoder: sentences, padded to one length.

    Args:
        tokenizer: of transformers.
        chosen: the sentences.
        size: sentences of a batch.
        model: whose context cuts longer sentences; None: the tokenizer's limit does.

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
    limit = context_length(model, tokenizer)
    options = dict(padding=True, padding_side="right", truncation=True, max_length=limit, return_tensors="pt")
    return [dict(tokenizer(group, **options)) for group in groups]


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
