"""e2m1 codes against the standard's values, and power-of-two scales against the paper's."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import decode_e2m1, encode_e2m1, power_of_two_scales
from qcompile.numerics.rounding import quantize_tensor


def test_e2m1_is_the_standard_format():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode_e2m1(codes).tolist() == [*values, *[-v for v in values]]
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 99.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert decode_e2m1(encode_e2m1(-ties.double())).tolist() == [-0.0, -1, -1, -2, -2, -4, -4, -6]


def test_the_middle_between_two_values_parts_them():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for low, high in itertools.pairwise(values):
        sides = torch.tensor([(low + high) / 2 - 1e-3, (low + high) / 2 + 1e-3])
        assert decode_e2m1(encode_e2m1(sides)).tolist() == [low, high]


@given(st.floats(-8, 8))
def test_e2m1_is_the_nearest(x):
    got = float(decode_e2m1(encode_e2m1(torch.tensor([x])))[0])
    assert abs(got - x) <= min(abs(v * s - x) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (1, -1)) + 1e-6


def test_e2m1_times_a_power_of_two_is_e4m3():
    """ZeroQuant-FP's cast: exact for every exponent that `power_of_two_scales` gives, and not one further."""
    values = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    exact = [bool((values * 2.0**k == (values * 2.0**k).to(torch.float8_e4m3fn).float()).all()) for k in range(-9, 8)]
    assert exact == [False, *[True] * 15, False]  # -8 .. 6
    _, exponents = power_of_two_scales(torch.tensor([[1.0, 1e-9, 0.3]]), "m2")
    assert exponents.tolist() == [[0, -8, -2]]


def test_free_scales_beat_constrained_ones_and_nearest_beats_the_papers_ceil():
    w = torch.distributions.StudentT(5.0).sample((64, 16 * 256))
    loss = {m: float((quantize_tensor(w, Format.parse(f"fp4/group256{m}")).dequantize() - w).square().sum())
            for m in ("", "/m1", "/m2", "/m1ceil", "/m2ceil")}  # fmt: skip
    assert loss[""] < loss["/m1"] < 1.25 * loss[""] and loss[""] < loss["/m2"] < 1.25 * loss[""], loss
    assert loss["/m2"] < loss["/m2ceil"] < loss["/m1ceil"], loss


def test_ceil_constraints_are_the_papers():
    scale = torch.tensor([[3.0, 1.1, 0.5]])
    row, exponent = power_of_two_scales(scale, "m1ceil")
    assert (row * 2.0**exponent).tolist() == [[4, 2, 0.5]]
    row, exponent = power_of_two_scales(scale, "m2ceil")
    assert (row * 2.0**exponent).tolist() == [[3, 0.75, 0.375]]  # s_max / 2^ceil(log2(s_max / s))
