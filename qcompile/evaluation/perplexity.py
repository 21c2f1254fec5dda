"""Quality of a model on a text: perplexity, KL divergence to the float model, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.progress import track
from torch import Tensor


def perplexity(
    model: Callable[..., Any], token_windows: Sequence[Tensor], *, progress: bool = True, label: str = "perplexity"
) -> float:
    """exp of the mean negative log-likelihood over all next tokens, each window on its own.

    Args:
        model: called with input_ids [1, T]; returns an object with `logits` [1, T, V], or the logits.
        token_windows: int64 [1, T] each.
        progress: show a bar.
        label: the bar's name.

    Returns:
        The perplexity; infinite where the likelihood underflows.

    Raises:
        ValueError: no window, or one without a next token.
    """
    check_windows(token_windows)
    total, count = 0.0, 0
    for ids in track(token_windows, escape(label), disable=not progress, transient=True):
        scores = logits_of(model, ids)[0, :-1]
        # cross_entropy in float32, 512 tokens at a time: the logits of a long window are the largest tensor
        for start in range(0, scores.shape[0], 512):
            part = scores[start : start + 512].float()
            target = ids[0, 1 + start : 1 + start + part.shape[0]]
            total += float(torch.nn.functional.cross_entropy(part, target, reduction="sum"))
        count += scores.shape[0]
    return _exp(total / count)


def check_windows(token_windows: Sequence[Tensor]) -> None:
    """Refuse windows that have no next token to predict. Raises ValueError."""
    shortest = min((ids.shape[1] for ids in token_windows), default=0)
    if shortest < 2:
        found = f"a window of {shortest} tokens" if token_windows else "no window"
        raise ValueError(f"{found}: nothing is predicted there. Fix: give windows of 2 tokens or more")


def _exp(mean: float) -> float:
    """exp that does not raise where it overflows."""
    return math.exp(mean) if mean < 700 or math.isnan(mean) else math.inf


def logits_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """The logits [1, T, V] of one window."""
    with torch.no_grad():
        out = model(input_ids=ids)
    found: Tensor = out.logits if hasattr(out, "logits") else out
    return found


@dataclass(frozen=True)
class Agreement:
    """The quality of a model on a text, and its distance from a reference.

    Attributes:
        perplexity: as `perplexity`.
        kl: mean KL(reference || model), nats per token.
        top1: share of tokens whose most likely successor is the reference's.
    """

    perplexity: float
    kl: float
    top1: float


def agreement(model: Callable[..., Any], reference: Callable[..., Any], token_windows: Sequence[Tensor]) -> Agreement:
    """Compare two models on windows of tokens.

    Each model runs once per window; the logits are compared in float32, 512 tokens at a time.

    Args:
        model: what is judged, called as `perplexity` does.
        reference: the float model.
        token_windows: int64 [1, T] each.

    Raises:
        ValueError: no window, or one without a next token.
    """
    check_windows(token_windows)
    loss, total, agree, count, predicted = 0.0, 0.0, 0, 0, 0
    for ids in token_windows:
        ours, theirs = logits_of(model, ids)[0], logits_of(reference, ids)[0]
        for start in range(0, ours.shape[0], 512):
            q = ours[start : start + 512].float().log_softmax(-1)
            p = theirs[start : start + 512].float().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            agree += int((q.argmax(-1) == p.argmax(-1)).sum())
            target = ids[0, 1 + start : 1 + start + q.shape[0]]
            loss -= float(q[: len(target)].gather(1, target[:, None]).sum())
            predicted += len(target)
        count += ours.shape[0]
    return Agreement(_exp(loss / predicted), total / count, agree / count)
