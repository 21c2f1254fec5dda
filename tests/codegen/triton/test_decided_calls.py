"""Calls by kind: decided once, forgotten after a measurement, and never more than a number of them."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.triton import decided_calls
from qcompile.codegen.triton.decided_calls import decided, dense, on_device
from qcompile.codegen.triton.launch.gemm import Gpu
from qcompile.codegen.triton.launch.measured_times import remember_times


@pytest.fixture(autouse=True)
def none_decided():
    decided_calls._DECIDED.clear()
    yield
    decided_calls._DECIDED.clear()


def test_a_kind_is_shapes_dtypes_and_what_is_no_tensor():
    made = []

    def decide():
        made.append(len(made))
        return made[-1]

    x = torch.ones(2, 3)
    for tensors in ([x, None], [x.clone(), None], [x.half(), None], [x.view(3, 2), None], [None, x], [x, None]):
        decided(tensors, ("a",), decide)
    decided([x, None], ("b",), decide)
    assert len(made) == 5 and decided([x, None], ("a",), decide) == 0


def test_a_refused_call_is_refused_again():
    def refuse():
        raise ValueError("wrong")

    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            decided([torch.ones(1)], ("op",), refuse)


def test_a_measurement_makes_calls_be_decided_anew(own_cache):
    made = []
    for _ in range(2):
        decided([torch.ones(1)], ("op",), lambda: made.append(1) or 1)
    remember_times(Gpu(), "layer", 16, 16, 1, {"kernel": 1.0})
    decided([torch.ones(1)], ("op",), lambda: made.append(1) or 1)
    assert len(made) == 2


def test_kinds_do_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(decided_calls, "_MOST", 3)
    for size in range(1, 9):
        decided([torch.ones(size)], ("op",), lambda size=size: size)
        assert len(decided_calls._DECIDED) <= 3


def test_dense_copies_what_is_not():
    x = torch.ones(4, 6)
    same, copied, none = dense(x, x.t(), None)
    assert same is x and none is None and copied.is_contiguous() and torch.equal(copied, x.t())


def test_the_device_of_a_tensor_becomes_the_current_one(monkeypatch):
    entered = []

    class Other:
        def get_device(self):
            return 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index))
    with on_device(torch.ones(1)):
        pass
    assert on_device(Other()) is None and entered == [1]
