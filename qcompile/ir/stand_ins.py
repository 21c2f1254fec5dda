"""Stand-ins for a model's stored tensors while it is traced: a tracer needs shapes only, of tensors that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.memory.stored_tensor import StoredTensor


@contextmanager
def stand_ins(module: nn.Module, inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """Put fake tensors in the place of a module's stored tensors while the block runs.

    Args:
        module: changed while the block runs.
        inputs: what it is to be traced with.

    Yields:
        The inputs; fake ones, of the same mode, where the module has a stored tensor.
    """
    holders: list[Any] = [tensors for part in module.modules() for tensors in (part._parameters, part._buffers)]
    places = [
        (holder, name, tensor)
        for holder in holders
        for name, tensor in holder.items()
        if isinstance(tensor, StoredTensor)
    ]
    if not places:
        yield inputs
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}
    for holder, name, tensor in places:
        with mode:
            if id(tensor) not in made:  # tied ones share theirs
                made[id(tensor)] = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
        is_parameter = isinstance(tensor, nn.Parameter)
        holder[name] = nn.Parameter(made[id(tensor)], requires_grad=False) if is_parameter else made[id(tensor)]
    try:
        yield [mode.from_tensor(tensor) for tensor in inputs]
    finally:
        for holder, name, tensor in places:
            holder[name] = tensor
