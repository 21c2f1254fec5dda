"""Devices that there are kernels for: CPUs and NVIDIA GPUs. On any other a model is compiled as it is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_WITH_KERNELS = frozenset({"cpu", "cuda", "meta"})
_warned: set[str] = set()


def without_kernels(inputs: Sequence[Any]) -> str | None:
    """The first device of some inputs that there are no kernels for; None where there is none.

    PyTorch calls an AMD GPU "cuda": a Triton kernel compiles there, with scratch memory and another fp8.
    """
    for tensor in inputs:
        if isinstance(tensor, Tensor) and tensor.device.type not in _WITH_KERNELS:
            return str(tensor.device)
        if isinstance(tensor, Tensor) and tensor.is_cuda and torch.version.hip:
            return f"{tensor.device} (ROCm {torch.version.hip})"
    return None


def warn_without_kernels(device: str) -> None:
    """Say once for each device that the model is compiled by Inductor, as it is."""
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"qcompile: there are kernels for CPUs and NVIDIA GPUs, none for {device}: Inductor compiles the model as "
            "it is, unquantized. Fix: move it to a CPU or an NVIDIA GPU, or export it (qcompile.export)",
            stacklevel=4,
        )
