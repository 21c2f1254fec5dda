"""What one step on one architecture came to: passed, refused for a reason, or at fault."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PASS, REFUSED, FAULT = "pass", "refused", "FAULT"


@dataclass(frozen=True)
class Outcome:
    """Of one step.

    Attributes:
        mark: PASS, REFUSED or FAULT.
        error: relative error against the float model, where the step measures one.
        text: the reason of a refusal, or what is wrong.
        seconds: it took.
    """

    mark: str
    error: float | None = None
    text: str = ""
    seconds: float = 0.0


class Fault(AssertionError):
    """A wrong result."""


class Declined(Exception):
    """What was asked for is not done; the report says so, and the result is right."""


def tensors(found: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, logits first; caches are skipped."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    if hasattr(found, "items"):
        values = [value for _, value in sorted(found.items(), key=lambda item: item[0] != "logits")]
    else:
        values = list(found) if isinstance(found, (tuple, list)) else []
    return [tensor for value in values for tensor in tensors(value)]


def distance(found: list[Tensor], want: list[Tensor]) -> float:
    """|found - want| / |want| of the first output, which is the logits where there are any."""
    if not found or not want:
        raise Fault(f"{len(found)} outputs, not {len(want)}")
    a, b = found[0].double(), want[0].double()
    if a.shape != b.shape:
        raise Fault(f"shape {tuple(a.shape)}, not {tuple(b.shape)}")
    return float((a - b).norm() / b.norm())


def same(found: list[Tensor], want: list[Tensor]) -> bool:
    """Whether outputs are equal bit by bit, NaN too."""
    return len(found) == len(want) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, want, strict=True)
    )


def one_line(error: BaseException) -> str:
    """An exception's text in one line that a table can have, without folders; of a long one, its begin and its end."""
    text = re.sub(r"(?<![\w.])/(?:[^\s/:]+/)+", "", " ".join(str(error).split()).replace("|", "/"))
    return text if len(text) <= 300 else f"{text[:180]} .. {text[-110:]}"
