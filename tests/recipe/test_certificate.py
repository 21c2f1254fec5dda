"""Certificates: what counts as the same, and which node is blamed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.ir.capture import capture
from qcompile.recipe.certificate import TOLERANCE, certify, first_difference, relative_error, storage_dtype, widen

aten = torch.ops.aten


@pytest.fixture
def program():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return capture(model, (torch.randn(3, 8),))


INPUTS = [torch.randn(5, 8)]
WIDE = widen(INPUTS, torch.float64)


def test_relative_errors():
    b = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    assert relative_error([b], [b]) == 0
    assert relative_error([b + 0.4], [b]) == pytest.approx(0.1)
    assert relative_error([b, b * 1.5], [b, b]) == pytest.approx(0.5)  # the worst pair
    assert relative_error([b.long() + 9, 5], [b.long(), 3]) == 0  # integers are compared by nobody
    assert relative_error([torch.zeros(0)], [torch.zeros(0)]) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_equals_itself_only(value):
    """And hides no other difference, as where a model masks logits by -inf."""
    b = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    broken = b.clone()
    broken[0, 0] = value
    assert relative_error([broken], [b]) == relative_error([b], [broken]) == float("inf")
    assert relative_error([broken], [broken]) == 0
    other = broken.clone()
    other[1, 0] += 0.4
    assert relative_error([other], [broken]) == pytest.approx(0.1)
    assert relative_error([-broken], [broken]) == (float("inf") if value == value else 2.0)


def test_a_difference_in_any_piece_is_found():
    from qcompile.recipe import certificate

    large = torch.ones(certificate._PIECE + 3)
    changed = large.clone()
    changed[-1] = 2
    assert relative_error([changed], [large]) == 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_is_that_of_the_storage(dtype):
    program = capture(nn.Linear(8, 4).to(dtype), (torch.randn(3, 8, dtype=dtype),))
    assert storage_dtype(program) == dtype
    found, outputs = certify("x", program, program.copy(), [torch.randn(5, 8, dtype=dtype)])
    assert found.holds and found.error == 0 and found.tolerance == TOLERANCE[dtype] and found.dtype in str(dtype)
    assert outputs[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_vectors_do_not_decide_the_storage(program):
    program.weights["0.bias"] = program.weights["0.bias"].bfloat16()
    assert storage_dtype(program) == torch.float32
    program.weights["2.weight"] = program.weights["2.weight"].half()
    assert storage_dtype(program) == torch.float16


def test_inputs_are_widened():
    floats, ids = widen([torch.ones(2).half(), torch.tensor([1])], torch.float64)
    assert floats.dtype == torch.float64 and ids.dtype == torch.int64
    assert widen([3], torch.float64) == [3]


def test_an_exact_rewriting_holds_and_a_wrong_one_is_blamed(program):
    after = program.copy()
    after.weights["0.weight"] = after.weights["0.weight"] * 2
    after.weights["0.bias"] = after.weights["0.bias"] * 2
    after.weights["2.weight"] = after.weights["2.weight"] / 2
    found, outputs = certify("Scale", program, after, INPUTS, changed={"linear", "relu"})
    assert found.holds and found.blame == "" and found.name == "Scale"
    assert torch.allclose(outputs[0], program(*INPUTS)[0], atol=1e-5)
    after.weights["2.weight"] = after.weights["2.weight"] * 1.1
    found, _ = certify("Scale", program, after, INPUTS, changed={"linear", "relu"})
    assert not found.holds and found.blame == "linear_1"


def test_what_changes_on_purpose_is_not_blamed(program):
    after = program.copy()
    after.weights["0.weight"] = after.weights["0.weight"] * 1.5
    assert first_difference(program, after, WIDE, set()) == "linear"
    assert first_difference(program, after, WIDE, {"linear", "relu"}) == "linear_1"
    every = {node.name for node in program.graph.nodes}
    assert first_difference(program, after, WIDE, every) == "the output"


def test_a_value_of_another_shape_is_a_difference(program):
    after = program.copy()
    node = next(n for n in after.graph.nodes if n.name == "relu")
    node.target, node.args = aten.unsqueeze.default, (node.args[0], 0)
    assert first_difference(program, after, WIDE, set()) == "relu"


def test_outputs_of_the_program_before_are_reused(program, monkeypatch):
    _, outputs = certify("first", program, program.copy(), INPUTS)
    after = program.copy()
    monkeypatch.setattr(program, "widened", None)
    found, _ = certify("second", program, after, INPUTS, before_outputs=outputs)
    assert found.holds and found.error == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_law_that_errs_by_percents_is_found_in_every_storage(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    inputs = [torch.randn(5, 8, dtype=dtype)]
    program = capture(model, inputs)
    after = program.copy()
    after.weights["0.weight"] = after.weights["0.weight"] * 1.5
    found, _ = certify("wrong", program, after, inputs)
    assert not found.holds and found.blame == "linear"
