"""The distance of outputs: error, agreement, divergence."""

from __future__ import annotations

import math

import pytest
import torch

from qcompile.numerics.output_distance import OutputDistance


def test_the_error_is_relative_over_all_floating_point_outputs():
    f = [torch.tensor([3.0, 4.0]), torch.tensor([1, 2]), torch.zeros(2)]
    q = [torch.tensor([3.0, 4.5]), torch.tensor([7, 7]), torch.zeros(2)]
    distance = OutputDistance.between(f, q, None)
    assert distance.error == pytest.approx(0.5 / 5) and distance.tokens == 0
    assert distance.metrics() == {"relative error of the output": distance.error}


def test_logits_are_compared_token_by_token():
    f = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]])
    q = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 3.0, 2.0]]])
    distance = OutputDistance.between([f], [q], 0)
    p, r = f[0, 1].softmax(-1), q[0, 1].softmax(-1)
    assert distance.tokens == 2 and distance.agreement == 0.5
    assert distance.size == distance.divergence and "nats per token" in str(distance)
    assert distance.divergence == pytest.approx(float((p * (p / r).log()).sum()) / 2, rel=1e-5)


def test_the_logits_are_the_output_that_is_named():
    hidden, f = torch.randn(1, 2, 5), torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]])
    distance = OutputDistance.between([hidden, f], [-hidden, f], 1)
    assert (distance.tokens, distance.agreement, distance.divergence) == (2, 1.0, 0.0)
    lone = OutputDistance.between([f[0, 0]], [2 * f[0, 0]], 0)  # without a dimension of tokens
    assert (lone.tokens, lone.error, lone.size) == (0, 1.0, 1.0)


def test_the_error_beside_zeros_is_absolute():
    assert OutputDistance.between([torch.zeros(2)], [torch.tensor([3.0, 4.0])], None).error == 5


def test_values_that_are_masked_with_infinity_do_not_count_and_new_ones_do():
    f = torch.tensor([1.0, -math.inf])
    assert OutputDistance.between([f], [torch.tensor([1.0, -math.inf])], None).error == 0
    assert OutputDistance.between([f], [torch.tensor([1.5, -math.inf])], None).error == 0.5
    assert OutputDistance.between([f], [torch.tensor([math.nan, -math.inf])], None).error == math.inf
