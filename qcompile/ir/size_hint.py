"""The integer behind a symbolic size."""

from __future__ import annotations

from typing import Any

import torch

_OF_DATA = 7919  # a prime that is the size of nothing else: what is assumed of it fits no other value


def hint(size: Any) -> Any:
    """The integer that a symbolic size had in the example, a prime if it depends on data; anything else unchanged."""
    if not isinstance(size, torch.SymInt):
        return size
    return _OF_DATA if size.node.hint is None else int(size.node.hint)
