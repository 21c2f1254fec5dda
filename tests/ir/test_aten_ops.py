"""Classes of ATen operators: every member does what its class says, and classes that must not meet do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from qcompile.ir import aten_ops
from qcompile.ir.aten_ops import (
    ACTIVATIONS,
    ALIASES,
    CASTS,
    DROPOUTS,
    EXPANDS,
    FILLS,
    JOINS,
    MATMULS,
    MOVES,
    PRODUCTS,
    RESHAPES,
    SIZES,
    SLICES,
    SOFTMAX,
    SPLITS,
    TRANSPOSES,
    VIEWS,
    aten,
    is_cast,
    reads_elements,
)
from qcompile.ir.capture import capture

X = torch.arange(24.0).view(2, 3, 4).clone()  # no view, which some operators refuse
CALLS = {  # an example of the arguments of each operator
    aten.to.dtype: (X, torch.float64),
    aten.to.dtype_layout: (X,),
    aten.to.device: (X, X.device, torch.float64),
    aten.to.other: (X, X.double()),
    aten._to_copy.default: (X,),
    aten.type_as.default: (X, X.double()),
    aten.alias.default: (X,),
    aten.detach.default: (X,),
    aten.detach_.default: (X,),
    aten.lift_fresh_copy.default: (X,),
    aten.contiguous.default: (X,),
    aten.clone.default: (X,),
    aten.dropout.default: (X, 0.5, False),
    aten.native_dropout.default: (X, 0.5, False),
    aten.feature_dropout.default: (X, 0.5, False),
    aten.view.default: (X, [4, 6]),
    aten.reshape.default: (X, [6, 4]),
    aten._unsafe_view.default: (X, [6, 4]),
    aten.flatten.using_ints: (X, 1),
    aten.unflatten.int: (X, -1, [2, 2]),
    aten.unsqueeze.default: (X, 1),
    aten.squeeze.dim: (X[:1], 0),
    aten.squeeze.default: (X[:1],),
    aten.transpose.int: (X, 0, 2),
    aten.permute.default: (X, [2, 0, 1]),
    aten.t.default: (X[0],),
    aten.mT.default: (X,),
    aten.numpy_T.default: (X[0],),
    aten.expand.default: (X[:1], [5, 3, 4]),
    aten.repeat_interleave.self_int: (X, 2, 1),
    aten.slice.Tensor: (X, 1, 1, 3),
    aten.select.int: (X, 1, 2),
    aten.split.Tensor: (X, 2, -1),
    aten.split_with_sizes.default: (X, [1, 3], -1),
    aten.chunk.default: (X, 2, -1),
    aten.cat.default: ([X, X], 1),
    aten.stack.default: ([X, X], 1),
    aten.relu.default: (X - 7,),
    aten.gelu.default: (X - 7,),
    aten.silu.default: (X - 7,),
    aten.tanh.default: (X - 7,),
    aten.sigmoid.default: (X - 7,),
    aten.softmax.int: (X, -1),
    aten._softmax.default: (X, -1, False),
    aten.ones_like.default: (X,),
    aten.zeros_like.default: (X,),
    aten.full_like.default: (X, 3.0),
    aten.empty_like.default: (X,),
    aten.new_ones.default: (X, [2]),
    aten.new_zeros.default: (X, [2]),
    aten.new_full.default: (X, [2], 3.0),
    aten.new_empty.default: (X, [2]),
}
CLASSES = {name: ops for name, ops in vars(aten_ops).items() if name.isupper() and isinstance(ops, frozenset)}


def called(op):
    return op(*CALLS[op])


def test_every_member_is_an_operator():
    for name, ops in CLASSES.items():
        assert ops and all(isinstance(op, torch._ops.OpOverload) for op in ops), name


@pytest.mark.parametrize("op", sorted(CASTS, key=str), ids=str)
def test_casts_keep_the_values(op):
    assert torch.equal(called(op).float(), X)


@pytest.mark.parametrize("op", sorted(ALIASES | DROPOUTS, key=str), ids=str)
def test_aliases_are_the_same_tensor(op):
    value = called(op)
    assert torch.equal(value[0] if isinstance(value, tuple) else value, X)


@pytest.mark.parametrize("op", sorted(RESHAPES, key=str), ids=str)
def test_reshapes_keep_the_order_of_the_elements(op):
    assert torch.equal(called(op).flatten(), CALLS[op][0].flatten())


@pytest.mark.parametrize("op", sorted(TRANSPOSES, key=str), ids=str)
def test_transposes_change_the_order_of_the_elements(op):
    value, source = called(op), CALLS[op][0]
    assert sorted(value.flatten().tolist()) == sorted(source.flatten().tolist())
    assert value.flatten().tolist() != source.flatten().tolist()


@pytest.mark.parametrize("op", sorted(EXPANDS, key=str), ids=str)
def test_expands_repeat_elements(op):
    value, source = called(op), CALLS[op][0]
    assert set(value.flatten().tolist()) == set(source.flatten().tolist()) and value.numel() > source.numel()


@pytest.mark.parametrize("op", sorted(SLICES, key=str), ids=str)
def test_slices_drop_elements(op):
    value, source = called(op), CALLS[op][0]
    assert set(value.flatten().tolist()) < set(source.flatten().tolist())


@pytest.mark.parametrize("op", sorted(MOVES, key=str), ids=str)
def test_moves_compute_nothing(op):
    """One tensor in, one out; codes of another dtype would be moved in the same way."""
    first, *rest = CALLS[op]
    assert torch.equal(op(first.long(), *rest), called(op).long())


@pytest.mark.parametrize("op", sorted(SPLITS, key=str), ids=str)
def test_splits_have_all_elements_once(op):
    parts = called(op)
    assert len(parts) == 2 and sorted(torch.cat([p.flatten() for p in parts]).tolist()) == X.flatten().tolist()


@pytest.mark.parametrize("op", sorted(JOINS, key=str), ids=str)
def test_joins_take_a_list_and_a_dimension_of_the_result(op):
    value = called(op)
    assert value.numel() == 2 * X.numel() and torch.equal(value.unflatten(1, (2, -1))[:, 0].reshape(X.shape), X)


@pytest.mark.parametrize("op", sorted(ACTIVATIONS, key=str), ids=str)
def test_activations_are_functions_of_every_element(op):
    value, source = called(op), CALLS[op][0]
    order = torch.randperm(source.numel())
    assert torch.allclose(op(source.flatten()[order]), value.flatten()[order])


@pytest.mark.parametrize("op", sorted(SOFTMAX, key=str), ids=str)
def test_softmax_sums_to_one(op):
    assert torch.allclose(called(op).sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("op", sorted(FILLS, key=str), ids=str)
def test_fills_read_no_element(op):
    first, *rest = CALLS[op]
    if "empty" not in str(op):
        assert torch.equal(op(torch.full_like(first, torch.nan), *rest), called(op))
    assert called(op).dtype == first.dtype


def test_classes_do_not_overlap():
    apart = [CASTS, ALIASES, DROPOUTS, SIZES, FILLS, PRODUCTS, SOFTMAX, TRANSPOSES, EXPANDS, SLICES, SPLITS, JOINS]
    for one, other in itertools.combinations([*apart, ACTIVATIONS], 2):
        assert not one & other
    assert ALIASES & RESHAPES == {aten.contiguous.default}  # `normalize` drops it; after it nobody meets one
    assert VIEWS < RESHAPES < MOVES and MATMULS < PRODUCTS
    assert MOVES == RESHAPES | TRANSPOSES | EXPANDS | SLICES


class Reads(nn.Module):
    def forward(self, x, y):
        return x.new_ones(2), torch.zeros_like(x), y.type_as(x), x * y, x.double()


def test_what_reads_elements():
    program = capture(Reads(), (torch.randn(3, 4), torch.arange(12).view(3, 4)))
    x, y = program.inputs
    read = {str(user.target): reads_elements(user, x) for user in x.users}
    assert read == {
        "aten.new_ones.default": False,
        "aten.zeros_like.default": False,
        "aten.type_as.default": False,
        "aten.mul.Tensor": True,
        "aten.to.dtype": True,
    }
    assert all(reads_elements(user, y) for user in y.users)


def test_sizes_read_no_element():
    class Sizes(nn.Module):
        def forward(self, x):
            return torch.ones(x.shape[0])

    program = capture(Sizes(), (torch.randn(3, 4),))
    (size,) = program.inputs[0].users
    assert size.target in SIZES and not reads_elements(size, program.inputs[0])


def test_casts_of_floats_to_floats_are_casts():
    class Casts(nn.Module):
        def forward(self, x):
            return x.double(), x.long(), (x > 0).float(), x.sin(), x.double().to(x)

    program = capture(Casts(), (torch.randn(3, 4),))
    assert [is_cast(node) for node in program.outputs] == [True, False, False, False, True]
    assert not is_cast(program.inputs[0])


@pytest.mark.parametrize("op", sorted(MATMULS, key=str), ids=str)
def test_products_are_bilinear(op):
    x, y = X, X.mT.contiguous()
    assert torch.equal(op(2 * x, y), op(x, 2 * y)) and torch.equal(op(2 * x, y), 2 * op(x, y))
