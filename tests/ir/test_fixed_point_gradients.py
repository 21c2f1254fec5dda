"""The backward operators: opcheck, exact sums, state that moves in one place only."""

from __future__ import annotations

import math

import pytest
import torch
from fixed_point_cases import linear_arguments, state

from qcompile.numerics.fixed_point_format import FixedPointFormat

ops = torch.ops.qcompile
TEXT = str(FixedPointFormat())


def codes(*shape):
    return torch.randint(-7, 8, shape, dtype=torch.int8)


def test_opcheck():
    step, scales = torch.tensor(0.1), torch.tensor([0.2, 0.3])
    arguments = (codes(2, 5, 8), step, codes(2, 5, 16), codes(8, 16), scales, torch.float32)
    torch.library.opcheck(ops.fixed_point_linear_backward.default, arguments)
    arguments = (codes(2, 8, 4), step, codes(2, 4, 6), codes(8, 2, 3), scales, [1], [0], [1], 2, TEXT, torch.float32)
    torch.library.opcheck(ops.fixed_point_conv_backward.default, arguments)
    arguments = (torch.randn(3, 4), *state(0.5), torch.ones(2), TEXT, True)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.fixed_point_round_gradient.default, arguments, test_utils=utils)


def test_linear_sums_are_exact():
    g, x, w = codes(6, 8), codes(6, 16), codes(8, 16)
    step, scales = torch.tensor(0.1), torch.tensor([0.2, 0.3])
    dx, dw, db = ops.fixed_point_linear_backward(g, step, x, w, scales, torch.float64)
    wide = [t.double() for t in (step, *scales)]
    assert torch.equal(dx, (g.double() @ w.double()) * (wide[0] * wide[2]))
    assert torch.equal(dw, (g.double().t() @ x.double()) * (wide[0] * wide[1]))
    assert torch.equal(db, g.double().sum(0) * wide[0])


@pytest.mark.parametrize("training", [True, False])
def test_only_training_moves_state(training):
    act_range, gamma, counter = state(0.5)
    gradient, ranges = torch.randn(64, 64), torch.tensor([2.0, 1.0])
    first = ops.fixed_point_round_gradient(gradient, act_range, gamma, counter, ranges, TEXT, training)
    again = ops.fixed_point_round_gradient(gradient, act_range, gamma, counter, ranges, TEXT, training)
    assert (int(counter), float(act_range)) == ((2, 2.0) if training else (0, 0.0))
    assert (float(gamma) != 0.5) == training
    assert torch.equal(first[0], again[0]) == (not training)  # another draw after each step


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_moves_no_range(bad):
    for gradient, ranges in ((torch.full((4,), bad), torch.ones(2)), (torch.ones(4), torch.tensor([bad, 1.0]))):
        act_range, gamma, counter = state(0.5)
        ops.fixed_point_round_gradient(gradient, act_range, gamma, counter, ranges, TEXT, True)
        assert float(act_range) == 0 and math.isfinite(float(gamma))


def test_processes_draw_different_values(monkeypatch):
    """Two ranks, and one rank a step later, round the same gradient to four results."""
    gradient, found = torch.randn(512), []
    for rank, step in ((0, 0), (1, 0), (0, 1), (1, 1)):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        act_range, gamma, counter = state(0.5)
        counter.fill_(step)
        found.append(ops.fixed_point_round_gradient(gradient, act_range, gamma, counter, torch.ones(2), TEXT, True)[0])
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_gradients_are_computed_for_what_is_trained_alone():
    arguments = linear_arguments()
    arguments[0] = arguments[0].detach()
    ops.fixed_point_linear(*arguments)[0].sum().backward()
    assert arguments[1].grad is not None and arguments[0].grad is None
