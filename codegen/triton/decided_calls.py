"""Calls of operators on a GPU by kind: arguments are checked and launches are decided once, then only launched.

A kind is the dtypes, shapes and devices of all tensors, and what is no tensor. A decoded token repeats the kinds of the
one before, so checking and deciding are paid for once, and a call costs the CPU a lookup, its result's memory and the
launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcompile.codegen.triton.launch.tuning_cache import after_a_measurement

Plan = TypeVar("Plan")

_MOST = 4096  # kinds that are kept; a prompt of another length is another kind
_DECIDED: dict[tuple[Any, ...], Any] = {}
_HERE = contextlib.nullcontext()
after_a_measurement(_DECIDED.clear)


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same tensors, contiguous."""
    return tuple([t if t is None or t.is_contiguous() else t.contiguous() for t in tensors])


def decided(tensors: Sequence[Tensor | None], rest: tuple[Any, ...], decide: Callable[[], Plan]) -> Plan:
    """What was decided for calls of this kind.

    Args:
        tensors: of the call, contiguous.
        rest: the operator, and its arguments that are no tensors.
        decide: checks the arguments and decides; called for the first call of a kind.
    """
    kind = (rest, tuple([None if t is None else (t.dtype, t.shape, t.get_device()) for t in tensors]))
    found: Plan | None = _DECIDED.get(kind)
    if found is None:
        if len(_DECIDED) >= _MOST:
            _DECIDED.clear()
        found = _DECIDED[kind] = decide()
    return found


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of a tensor the current one, where it is not."""
    device = x.get_device()
    return _HERE if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)
