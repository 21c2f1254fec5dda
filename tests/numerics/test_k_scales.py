"""Steps and offsets of k6 formats are exact, and what the values and kernels of a single level are made of."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.format import Format
from qcompile.numerics.k_scales import single_level, steps_and_offsets
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

K6 = Format.parse("int4/group32/k6")


def random_parts(seed, rows=3, blocks=2):
    """Parts of k6 that use all bits."""
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(rows, 2 * blocks, generator=generator) * 0.1 + 1e-3).half()
    minimum, multiplier = (torch.randint(low, 64, (rows, 8 * blocks), generator=generator) for low in (0, 1))
    codes = torch.randint(0, 16, (rows, 256 * blocks), generator=generator).to(torch.uint8)
    return codes, scale, minimum.to(torch.uint8), multiplier.to(torch.int8)


@given(st.integers(0, 2**20))
def test_products_are_exact(seed):
    _, scale, minimum, multiplier = random_parts(seed)
    step, offset = steps_and_offsets(scale, minimum, multiplier)
    d, dmin = (scale[:, i::2].double().repeat_interleave(8, 1) for i in (0, 1))
    assert step.dtype == torch.float32 and torch.equal(step.double(), d * multiplier)
    assert torch.equal(offset.double(), dmin * minimum)


@given(st.integers(0, 2**20))
def test_values_are_rounded_once(seed):
    codes, scale, minimum, multiplier = random_parts(seed)
    step, offset = (part.double().repeat_interleave(32, 1) for part in steps_and_offsets(scale, minimum, multiplier))
    values = QTensor(codes, scale, minimum, multiplier, K6).dequantize()
    assert torch.equal(values, (codes.double() * step - offset).float())


@given(st.integers(0, 2**20))
def test_a_single_level_has_the_same_codes_and_values(seed):
    parts = random_parts(seed)
    plain = QTensor(*single_level(*parts), Format.parse("int4/group32/floatzero"))
    values = QTensor(*parts, K6).dequantize()
    assert plain.codes is parts[0] and plain.group_scale is None
    assert torch.allclose(plain.dequantize(), values, rtol=0, atol=2e-6 * float(values.abs().max()))


def test_stored_sizes_are_those_of_the_file_but_for_whole_bytes():
    q = quantize_tensor(torch.randn(4, 512), K6)
    assert [tuple(part.shape) for part in q.stored_parts] == [(4, 256), (4, 4), (4, 16), (4, 16)]
    assert q.nbytes == 4 * 2 * (128 + 4 + 8 + 8)
