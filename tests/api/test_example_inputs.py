"""The arguments that a batch stands for, as a call and as flat inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile import CalibrationError, RecipeError
from qcompile.api.example_inputs import call_of, flat_inputs, own_example, traceable_example, widen_batch
from qcompile.ir.capture import capture


def test_missing_example_says_the_fix():
    with pytest.raises(RecipeError, match="example="):
        qcompile.quantize(nn.Linear(4, 4), "int8", progress=False)


def test_calibration_batches_must_agree():
    with pytest.raises(CalibrationError, match="lacks"):
        qcompile.quantize(
            build("bert"),
            "int8-smooth",
            [{**example("bert"), "attention_mask": torch.ones(2, 8)}, example("bert")],
            progress=False,
        )


@pytest.mark.parametrize(
    "batch,call",
    [
        ({"a": 1, "b": None}, ((), {"a": 1})),
        ((1, 2), ((1, 2), {})),
        ([1, 2], ((1, 2), {})),
        ("x", (("x",), {})),
    ],
)
def test_calls(batch, call):
    assert call_of(batch) == call


def test_a_batch_of_one_row_is_traced_with_two():
    one, two, scalar = torch.randn(1, 3), torch.randn(2, 3), torch.tensor(3.0)
    args, kwargs = widen_batch((one, two, 5), {"scalar": scalar, "one": one})
    assert torch.equal(args[0], torch.cat([one, one])) and args[1] is two and args[2] == 5
    assert kwargs["scalar"] is scalar and kwargs["one"].shape == (2, 3)


def test_inputs_are_in_the_order_of_the_first_batch():
    model, inputs = build("bert"), {**example("bert"), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    program = capture(model, (), inputs)
    other = dict(reversed(inputs.items()))
    flat = flat_inputs(program, other, inputs)
    assert [value is inputs[name] for name, value in zip(inputs, flat, strict=True)] == [True, True]


def test_a_batch_with_too_many_tensors():
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(CalibrationError, match="has 2 tensors, the model's graph takes 1"):
        flat_inputs(program, (torch.randn(2, 4), torch.randn(2, 4)), {})


def test_models_that_bring_their_own_example():
    args, kwargs = traceable_example(build("llama"))
    assert not args and kwargs["input_ids"].shape[0] >= 2
    with pytest.raises(RecipeError, match="Linear brings no example input to trace with. Fix"):
        own_example(nn.Linear(4, 4))
