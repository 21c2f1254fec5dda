"""Comparable runs of what draws random values; the caller's generator stays."""

from __future__ import annotations

import pytest
import torch

from qcompile.ir.repeated_draws import repeated_draws


def test_each_block_draws_the_same_and_the_caller_keeps_his_own():
    torch.manual_seed(7)
    want = torch.rand(3), torch.rand(3)
    torch.manual_seed(7)
    first = torch.rand(3)
    with repeated_draws():
        one = torch.rand(3)
    second = torch.rand(3)
    with repeated_draws():
        again = torch.rand(3)
    assert torch.equal(one, again) and torch.equal(first, want[0]) and torch.equal(second, want[1])


def test_an_error_gives_the_generator_back():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), repeated_draws():
        torch.rand(3)
        raise KeyError("x")
    assert torch.equal(torch.get_rng_state(), before)
