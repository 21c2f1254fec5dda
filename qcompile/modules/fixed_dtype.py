"""Modules whose scales and codes keep their dtype when the model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FixedDtypeModule(nn.Module):
    """A module with buffers that `model.half()`, `.to(dtype)` and the like must not cast; moves between devices apply.

    Attributes:
        FIXED_DTYPE: names of those buffers; None for all.
    """

    FIXED_DTYPE: tuple[str, ...] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = list(self._buffers) if self.FIXED_DTYPE is None else self.FIXED_DTYPE
        before = {name: tensor for name in names if (tensor := self._buffers[name]) is not None}
        apply: Callable[[Callable[[Tensor], Tensor], bool], Any] = super()._apply
        result = apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert isinstance(new, torch.Tensor)
            if new.dtype != old.dtype:  # a cast, not a move; it treats fp8 codes as floating point too
                self._buffers[name] = old.to(new.device)
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """As of any module; but a tensor of another dtype is an error, where torch would cast codes."""
        names = list(self._buffers) if self.FIXED_DTYPE is None else self.FIXED_DTYPE
        for name in names:
            own, other = self._buffers[name], state_dict.get(prefix + name)
            if own is not None and isinstance(other, Tensor) and own.dtype != other.dtype:
                error_msgs.append(f"{prefix}{name} is {other.dtype}, and must be {own.dtype}: it is of another format")
        load: Callable[..., None] = super()._load_from_state_dict
        load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
