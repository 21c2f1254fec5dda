"""Classes of ATen operators, by what they do to the elements of a tensor.

Every analysis and every target takes its operators from here: a new overload is added once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

Ops = frozenset[Any]
"""A set of OpOverloads; a node's `target` is tested against it."""

LINEAR = aten.linear.default
SDPA = aten.scaled_dot_product_attention.default

MATMULS: Ops = frozenset({aten.matmul.default, aten.bmm.default})
"""Products of two values that have no bias of their own."""

PRODUCTS: Ops = MATMULS | {LINEAR, SDPA}
"""Everything that sums over a dimension of two operands."""

CONVOLUTIONS: Ops = frozenset(
    {
        *(getattr(aten, f"conv{n}d").default for n in (1, 2, 3)),
        *(getattr(aten, f"conv{n}d").padding for n in (1, 2, 3)),
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.convolution.default,
    }
)
"""Products of a weight with windows of its input."""

RECURRENT: Ops = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})
"""Layers that multiply their own output by a weight, position by position."""

SOFTMAX: Ops = frozenset({aten.softmax.int, aten._softmax.default})
"""Exponentials that sum to one over a dimension."""

CASTS: Ops = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)
"""The same values in another dtype or on another device; of a second tensor only the dtype and the device are read."""

ALIASES: Ops = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.detach_.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)
"""The same values in the same dtype: `normalize` drops them, but for copies in another memory format."""

DROPOUTS: Ops = frozenset({aten.dropout.default, aten.native_dropout.default, aten.feature_dropout.default})
"""The input itself in evaluation; arguments: input, p, train."""

SIZES: Ops = frozenset({aten.sym_size.int, aten.sym_size.default, aten.size.default, aten.size.int})
"""Reads a shape, never an element."""

FILLS: Ops = frozenset(
    {
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.full_like.default,
        aten.empty_like.default,
    }
)
"""A constant of the shape and dtype of another tensor, whose elements are not read."""

VIEWS: Ops = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
"""The same elements in the same order under other sizes."""

RESHAPES: Ops = VIEWS | {
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.clone.default,
    aten.contiguous.default,
}
"""As VIEWS, with the operators that say the sizes in another way."""

TRANSPOSES: Ops = frozenset(
    {aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default}
)
"""The same elements in another order of the dimensions."""

EXPANDS: Ops = frozenset({aten.expand.default, aten.repeat_interleave.self_int})
"""Repeats elements (heads of grouped queries)."""

SLICES: Ops = frozenset({aten.slice.Tensor, aten.select.int})
"""Some of the elements, chosen by position."""

SPLITS: Ops = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
"""A list of tensors that do not overlap: all elements, by position."""

JOINS: Ops = frozenset({aten.cat.default, aten.stack.default})
"""One tensor of a list; the second argument is the dimension of the result."""

MOVES: Ops = RESHAPES | TRANSPOSES | EXPANDS | SLICES
"""Moves, repeats or drops elements and computes nothing: one tensor in, one out."""

ACTIVATIONS: Ops = frozenset(
    {aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default}
)
"""The same function of every element."""


def is_cast(node: fx.Node) -> bool:
    """Whether a node gives the same floats in another dtype or on another device. To integers it would round them."""
    values = (node.meta["val"], node.args[0].meta["val"]) if node.target in CASTS else ()  # type: ignore[union-attr]
    return bool(values) and all(value.is_floating_point() for value in values)


def reads_elements(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a node reads the elements of an operand, and not only its shape, dtype or device."""
    if node.target in SIZES or node.target in FILLS:
        return False
    return node.target not in CASTS or node.args[0] is operand
