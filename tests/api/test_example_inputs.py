"""The arguments that a batch stands for, as a call and as flat inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile import CalibrationError, RecipeError
from qcompile.api.example_inputs import call_of, flat_inputs, read_batches, trace_batches, widen_batch
from qcompile.ir.call_tree import CallTree
from qcompile.ir.capture import capture


def test_missing_example_says_the_fix():
    with pytest.raises(RecipeError, match="example="):
        qcompile.quantize(nn.Linear(4, 4), "int8", progress=False)


def test_calibration_batches_must_agree():
    with pytest.raises(CalibrationError, match="batch 2 lacks 'token_type_ids', which the first batch has"):
        qcompile.quantize(
            build("bert"),
            "int8-smooth",
            [{**example("bert"), "token_type_ids": torch.ones(2, 8, dtype=torch.long)}, example("bert")],
            progress=False,
        )


@pytest.mark.parametrize(
    "batch,call",
    [
        ({"a": 1, "b": None}, ((), {"a": 1})),
        ((1, 2), ((1, 2), {})),
        ([1, "x"], ((1, "x"), {})),
        (3, ((3,), {})),
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
    assert all(torch.equal(value, inputs[name]) for name, value in zip(inputs, flat, strict=True))


def test_a_batch_with_too_many_tensors():
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(CalibrationError, match="a batch has 'argument 2', which the first batch lacks"):
        flat_inputs(program, (torch.randn(2, 4), torch.randn(2, 4)), torch.randn(2, 4))


ROW, IDS = [[5, 6, 7]], [[5, 6, 7], [8, 9, 0]]


@pytest.mark.parametrize(
    "batch,shapes",
    [
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": (1, 3), "attention_mask": (1, 3)}),
        ({"input_ids": IDS, "labels": [0, 1]}, {"input_ids": (2, 3), "labels": (2,)}),
        ({"x": np.zeros((2, 3), np.float32)}, {"x": (2, 3)}),
        ({"x": {"y": [np.zeros(4)]}}, {"x['y'][0]": (4,)}),
        (np.zeros((2, 3)), {"argument 1": (2, 3)}),
        (IDS, {"argument 1": (2, 3)}),
        ([5, 6, 7], {"argument 1": (1, 3)}),
        ((IDS, IDS), {"argument 1": (2, 3), "argument 2": (2, 3)}),
    ],
)
def test_arrays_and_lists_become_tensors(batch, shapes):
    tensors = CallTree.of(*call_of(batch)).tensors
    assert {path: tuple(tensor.shape) for path, tensor in tensors.items()} == shapes


def test_lists_beside_tensors_stay_what_they_are():
    x = torch.ones(2)
    assert call_of((x, [2, 3])) == ((x, [2, 3]), {})
    assert call_of({"x": x, "sizes": [2, 3], "n": np.int64(4)}) == ((), {"x": x, "sizes": [2, 3], "n": 4})
    values = call_of([[0.5, 1.5]])[0][0]
    assert values.dtype == torch.float32 and values.tolist() == [[0.5, 1.5]]


class Text(nn.Module):
    def forward(self, x, mode="sum"):
        return x


@pytest.mark.parametrize(
    "batch,words",
    [
        ("hello", r"batch 3 is text \('hello'\).*tokenizer\(text, return_tensors='pt'\)"),
        (["a", "b"], r"batch 3 is text .*Fix: give token ids"),
        (np.array(["a"]), "batch 3 is text .*Fix: give token ids"),
        ({"x": ROW, "text": ["a"]}, "'text' of batch 3 is text.*or drop this key"),
        ({"x": [[1, 2], [3]]}, "'x' of batch 3 has rows of unequal lengths.*padding=True"),
        ([[1, 2], [3]], "batch 3 has rows of unequal lengths"),
    ],
)
def test_what_no_tensor_can_be_made_of_is_refused(batch, words):
    with pytest.raises(CalibrationError, match=words):
        call_of(batch, Text(), "batch 3")


def test_text_for_a_parameter_is_a_constant():
    assert call_of({"x": 1, "mode": "mean"}, Text())[1]["mode"] == "mean"


def test_batches_are_read_once_and_must_be_several():
    generator = (x for x in [1, 2])
    assert read_batches(generator) == [1, 2]
    with pytest.raises(CalibrationError, match="was read to its end before.*Fix: make it anew, or give a list"):
        read_batches(generator)
    with pytest.raises(CalibrationError, match="is empty: give at least one batch"):
        read_batches([])
    for one in ({"x": 1}, torch.ones(2, 3), np.ones(2)):
        with pytest.raises(CalibrationError, match=rf"batches is one {type(one).__name__}.*\[batch\]"):
            read_batches(one)
    with pytest.raises(CalibrationError, match="batches is a string.*tokenizer"):
        read_batches("text")
    with pytest.raises(CalibrationError, match="batches is int, not an iterable"):
        read_batches(5)


@pytest.mark.parametrize(
    "second,words",
    [
        (torch.randn(4, 5), r"batch 2: input is float32 \[4, 5\], and the graph takes float32 \[any, 8\]"),
        (torch.randn(4, 8).double(), r"batch 2: input is float64 \[4, 8\]"),
        (torch.randn(2, 2, 8), r"batch 2: input is float32 \[2, 2, 8\]"),
        ({"input": torch.randn(4, 8), "more": torch.ones(2)}, "batch 2 has 'more', which the first batch lacks"),
    ],
)
def test_batches_that_the_graph_does_not_take(second, words):
    first = {"input": torch.randn(3, 8)} if isinstance(second, dict) else torch.randn(3, 8)
    with pytest.raises(CalibrationError, match=words):
        trace_batches(nn.Linear(8, 4), [first, second])


def test_a_row_beside_other_sizes():
    program, flat = trace_batches(nn.Linear(8, 4), [torch.randn(1, 8), torch.randn(5, 8)])
    assert [program(*batch)[0].shape for batch in flat] == [(1, 4), (5, 4)]
