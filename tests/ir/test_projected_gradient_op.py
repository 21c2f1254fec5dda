"""qcompile::project_gradient: when a basis is found, when it is kept, and what follows for the schedule."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from qcompile.ir.projected_gradient_op import DUE, GAP, REFRESHES, stored_basis
from qcompile.numerics import low_rank
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

INT4 = "int4/group256/zero"


def state(rows, columns, rank=3, form="", queue=2, dtype=torch.float64):
    """Basis, scale, zero, first vector, similarities and schedule, at the start."""
    length = min(rows, columns)
    basis = (torch.zeros(rank, length, dtype=dtype), None, None)
    if form:
        basis = quantize_tensor(basis[0], Format.parse(form)).stored_parts[:3]
    return [*basis, torch.zeros(length, dtype=dtype), torch.zeros(queue), torch.tensor([0, 10, 0, 1])]


def call(x, g, parts, form="", threshold=0.4, factor=2):
    return torch.ops.qcompile.project_gradient(x, g, *parts, form, threshold, factor, torch.float64)


def pair(rows=9, columns=6, tokens=7, dtype=torch.float64):
    return torch.randn(tokens, columns, dtype=dtype), torch.randn(tokens, rows, dtype=dtype)


@pytest.mark.parametrize(("rows", "columns"), [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize("form", ["", INT4])
def test_a_due_basis_comes_from_this_gradient(rows, columns, form):
    x, g = pair(rows, columns)
    parts, left = state(rows, columns, form=form), rows < columns
    projected = call(x, g, parts, form)
    expected = low_rank.singular_basis(g.t() @ x, 3, left)
    basis = stored_basis(*parts[:3], form, min(rows, columns)).double()
    if form:
        codes = quantize_tensor(expected, Format.parse(form))
        assert torch.equal(parts[0], codes.stored()) and torch.equal(basis, codes.dequantize().double())
    else:
        assert torch.equal(basis, expected)
    assert torch.equal(projected, low_rank.project(x, g, basis, left))
    assert torch.equal(parts[3], expected[0]) and parts[5].tolist() == [0, 10, 1, 0]


def test_without_need_the_basis_stays():
    parts = state(9, 6)
    call(*pair(), parts)
    before = [part.clone() for part in parts if part is not None]
    projected = call(*(other := pair()), parts)
    assert all(torch.equal(a, b) for a, b in zip(before, [p for p in parts if p is not None], strict=True))
    assert torch.equal(projected, low_rank.project(*other, parts[0], False))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_gradient_without_a_basis_keeps_the_old_one_and_tries_again(bad):
    parts = state(9, 6)
    call(*pair(), parts)
    parts[5][DUE] = 1
    before = [part.clone() for part in parts if part is not None]
    x, g = pair()
    g = g * 0 if bad == 0 else g.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(bad, dtype=g.dtype))
    projected = call(x, g, parts)
    assert all(torch.equal(a, b) for a, b in zip(before, [p for p in parts if p is not None], strict=True))
    assert not projected.any() if bad == 0 else not torch.isfinite(projected).all()  # GradScaler sees it
    call(*pair(), parts)
    assert parts[5][DUE] == 0 and parts[5][REFRESHES] == 2


def test_the_interval_doubles_when_bases_are_alike_and_the_queue_is_full():
    parts, batch = state(9, 6), pair()
    gaps = []
    for _ in range(5):
        parts[5][DUE] = 1
        call(*batch, parts)
        gaps.append(int(parts[5][GAP]))
    assert gaps == [10, 10, 20, 40, 80]  # of a queue of two the first similarity comes with the second basis
    assert parts[4].tolist() == pytest.approx([1, 1])


def test_the_interval_stays_where_bases_differ():
    parts = state(64, 60)
    for _ in range(6):
        parts[5][DUE] = 1
        call(*pair(64, 60), parts, threshold=0.9)
    assert parts[5][GAP] == 10 and parts[5][REFRESHES] == 6 and 0 < float(parts[4][0]) < 0.9


def test_in_a_process_group_the_gradient_of_a_basis_is_summed(monkeypatch):
    """And only where a basis is due. (Two processes: tests/training/test_q_galore_training.py.)"""
    others, calls = torch.randn(9, 6, dtype=torch.float64), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: calls.append(gradient.add_(others)))
    (x, g), parts = pair(), state(9, 6)
    call(x, g, parts)
    assert torch.equal(parts[0], low_rank.singular_basis(g.t() @ x + others, 3, False))
    call(x, g, parts)
    assert len(calls) == 1


def test_half_precision_is_decomposed_in_float32():
    x, g = pair(dtype=torch.bfloat16)
    parts = state(9, 6, dtype=torch.float32)
    projected = torch.ops.qcompile.project_gradient(x, g, *parts, "", 0.4, 2, torch.float32)
    assert torch.equal(parts[0], low_rank.singular_basis(g.float().t() @ x.float(), 3, False))
    assert projected.dtype == torch.float32


def test_the_operator_is_well_formed():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for rows, columns, form in ((9, 6, INT4), (6, 9, "")):
        arguments = (*pair(rows, columns), *state(rows, columns, form=form), form, 0.4, 2, torch.float64)
        torch.library.opcheck(torch.ops.qcompile.project_gradient.default, arguments, test_utils=tests)
