"""Distances of outputs: values that are known, gradients, invariance to the chunks."""

from __future__ import annotations

import math

import torch

from qcompile.numerics.divergence import kl_divergence, relative_squared_error


def test_kl_divergence_of_two_coins():
    reference, logits = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert math.isclose(kl_divergence(reference, logits), want, rel_tol=1e-6)
    assert kl_divergence(reference, reference + 3) == 0, "logits have no origin"


def test_kl_divergence_is_the_mean_over_tokens_in_any_chunks():
    p, q = torch.randn(3, 350, 11), torch.randn(3, 350, 11, requires_grad=True)
    want = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True)
    found = kl_divergence(p, q)
    assert torch.allclose(found, want.sum(-1).mean(), rtol=1e-5)
    (gradient,) = torch.autograd.grad(found, q)
    assert torch.allclose(gradient, (q.softmax(-1) - p.softmax(-1)) / 1050, atol=1e-7)


def test_relative_squared_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_squared_error(reference, torch.tensor([3.0, 5.0])) == 1 / 25
    assert relative_squared_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_squared_error(reference, torch.tensor([3.0, 6.0])) == 4 / 25
    large = torch.tensor([300.0, 400.0], dtype=torch.float16)
    assert relative_squared_error(large, 2 * large) == 1, "squares are beyond float16"


def test_logits_of_few_bits_are_compared_in_float32():
    p, q = torch.randn(3, 7, 11).bfloat16(), torch.randn(3, 7, 11).bfloat16()
    assert torch.equal(kl_divergence(p, q), kl_divergence(p.float(), q.float()))
