"""Where a model is computed: checked before work, and its tensors moved there; stored ones when they are read."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.memory.stored_tensor import StoredTensor
from qcompile.recipe.rule import RecipeError


def known_device(name: str | torch.device) -> torch.device:
    """The device of a name, with its index.

    Args:
        name: as "cuda"; of several processes on one machine each takes the device of its LOCAL_RANK.

    Raises:
        RecipeError: PyTorch has no such device here.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a PyTorch without CUDA
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise RecipeError(f"device {str(name)!r} is not there: {reason}. Fix: another device, or none") from error
    if device.type == "meta":
        raise RecipeError("device 'meta' computes nothing. Fix: another device, or none")
    return device


def move_to_device(model: nn.Module, name: str | torch.device) -> torch.device:
    """Move a model to a device, in place; of a model whose weights lie in files nothing is read.

    Args:
        model: any.
        name: as of `known_device`.

    Returns:
        The device, with its index.

    Raises:
        RecipeError: PyTorch has no such device here; the model is as it was.
    """
    device = known_device(name)
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            own: Any = tensors
            for key, tensor in own.items():
                if isinstance(tensor, StoredTensor):  # Module.to would tear tied ones apart
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _placed(tensor, device)
                    own[key] = moved[id(tensor)]
    model.to(device)
    return device


def _placed(tensor: StoredTensor, device: torch.device) -> Tensor:
    there = tensor.detach().to(device)
    return nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there


def device_of(model: nn.Module) -> torch.device | None:
    """The one device of all tensors of a model; None if there are several, or none that computes."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    device = devices.pop() if len(devices) == 1 else None
    return None if device is None or device.type == "meta" else device
