"""What a format makes of a linear whose codes lie in a file: computed when it is written, not held until then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qcompile.ir.stand_ins import stand_ins
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.modules.quant_linear import QuantLinear

Compute = Callable[[QuantLinear], dict[str, Tensor]]
"""A quantized linear -> what a format stores of it, by name."""


def deferred(compute: Compute, linear: QuantLinear) -> dict[str, Tensor]:
    """What `compute` makes of a linear.

    Args:
        compute: computes with shapes alone, too: it looks at no value of the codes.
        linear: codes in memory, or stored tensors.

    Returns:
        The tensors; of those that depend on stored ones a StoredTensor, which calls `compute` again when it is read.
    """
    with stand_ins(linear, []):
        shapes = compute(linear)
    return {name: _later(compute, linear, name, part) if _is_fake(part) else part for name, part in shapes.items()}


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _later(compute: Compute, linear: QuantLinear, name: str, shape: Tensor) -> StoredTensor:
    like = torch.empty(shape.shape, dtype=shape.dtype, device="meta")
    return StoredTensor(like, lambda: compute(linear)[name].contiguous())
