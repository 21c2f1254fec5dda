"""qcompile::group_adapter and stack_adapter: a low-rank adapter that reads the mean of each group of channels.

    group_adapter(x, a, b, group, scaling) = scaling * pool(x) A^T B^T,    pool(x)_g = sum of x_k over group g / G

    stack_adapter(a, b, ..) = scaling / G * (B A), each value repeated over its group: what the adapter adds to a weight

A model multiplies a stack of experts itself, so that its adapters stand beside the weights, not beside the products.

Source: QA-LoRA, arXiv:2309.14717 sec. 3.3. A sum over a group passes through the zero point of the group, so that the
adapter can be merged (numerics/zero_shift.py). G divides also in a ragged last group, for the same reason.

The operators are composed of PyTorch's, so autograd, autocast and Inductor see through them, while a captured graph
keeps each as one node.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("qcompile", "FRAGMENT")
_LIBRARY.define("group_adapter(Tensor x, Tensor a, Tensor b, int group, float scaling) -> Tensor")
_LIBRARY.define("stack_adapter(Tensor a, Tensor b, int columns, int group, float scaling, ScalarType dtype) -> Tensor")


def pool_groups(x: Tensor, group: int) -> Tensor:
    """x [.., K] -> the sum of each group of columns divided by the group size, [.., ceil(K / group)]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group))
    return torch.unflatten(padded, -1, (-1, group)).sum(-1) / group


@torch.library.impl(_LIBRARY, "group_adapter", "CompositeImplicitAutograd")
def group_adapter(x: Tensor, a: Tensor, b: Tensor, group: int, scaling: float) -> Tensor:
    """The output of an adapter.

    Args:
        x: [.., K], what enters the quantized product.
        a: [r, ceil(K / group)], of any float dtype, in which the adapter is computed.
        b: [N, r].
        group: columns of a group, those of the weight's format.
        scaling: alpha / r.

    Returns:
        [.., N] of the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    groups = -(-x.shape[-1] // group)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != groups or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"qcompile::group_adapter: a is {list(a.shape)} and b is {list(b.shape)}, but must be [r, {groups}] and "
            f"[N, r] for x {list(x.shape)} in groups of {group}"
        )
    out = (pool_groups(x.to(a.dtype), group) @ a.t()) @ b.t()
    return (out * scaling).to(x.dtype)


@torch.library.impl(_LIBRARY, "stack_adapter", "CompositeImplicitAutograd")
def stack_adapter(a: Tensor, b: Tensor, columns: int, group: int, scaling: float, dtype: torch.dtype) -> Tensor:
    """What adapters add to a stack of weights.

    Args:
        a: [E, r, ceil(columns / group)], of any float dtype, in which the sum is computed.
        b: [E, N, r].
        columns: K of the weights.
        group: columns of a group, those of the weights' format.
        scaling: alpha / r.
        dtype: of the result.

    Returns:
        [E, N, K].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    groups = -(-columns // group)
    if a.ndim != 3 or b.ndim != 3 or a.shape[2] != groups or b.shape[::2] != a.shape[:2]:
        raise ValueError(
            f"qcompile::stack_adapter: a is {list(a.shape)} and b is {list(b.shape)}, but must be [E, r, {groups}] and "
            f"[E, N, r] for {columns} columns in groups of {group}"
        )
    of_column = torch.arange(columns, device=a.device) // group
    return ((b @ a) * (scaling / group)).index_select(-1, of_column).to(dtype)
