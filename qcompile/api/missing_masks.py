"""Attention masks that only some of the batches have: a batch without one has no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from qcompile.ir.call_tree import CallTree

_MASK = "attention_mask"


def with_all_masks(calls: Sequence[CallTree]) -> list[CallTree]:
    """Calls that all have the masks [B, T] that any of them has; one that is missing is 1 for every token.

    A call whose tokens are not known by the names `input_ids` or `inputs_embeds` stays without.
    """
    masks: dict[str, Tensor] = {}
    for call in calls:
        for name, value in call.kwargs.items():
            if name.endswith(_MASK) and isinstance(value, Tensor) and value.ndim == 2:
                masks.setdefault(name, value)
    return [replace(call, kwargs=call.kwargs | _missing(call, masks)) for call in calls]


def _missing(call: CallTree, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    given: dict[str, Any] = dict(zip(call.names, call.args, strict=False)) | call.kwargs
    found = {}
    for name, like in masks.items():
        side = name.removesuffix(_MASK)
        tokens = next((given[n] for n in (f"{side}input_ids", f"{side}inputs_embeds") if n in given), None)
        if name not in given and isinstance(tokens, Tensor) and tokens.ndim >= 2:
            found[name] = like.new_ones(tokens.shape[:2], device=tokens.device)
    return found
