"""qcompile::read_cache: codes of a quantized cache, what they are worth, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.ir.cache_op import read_cache
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor


def stored(x, bits):
    """Codes, scale and zero point of a cache."""
    q = quantize_tensor(x, Format.parse(f"int{bits}/row/zero"))
    return q.stored(), q.scale.half(), q.zero


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(0, 5), st.sampled_from([2, 16, 30]), st.booleans(), st.booleans())
def test_it_gives_back_what_was_rotated_and_centered(bits, tokens, width, rotated, centered):
    torch.manual_seed(tokens)
    x = torch.randn(2, 3, tokens, width, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0] if rotated else None
    center = torch.randn(3, 1, width, dtype=torch.float64) if centered else None
    kept = x if center is None else x - center
    kept = (kept if rotation is None else kept @ rotation).float()
    parts = stored(kept, bits)
    of = tuple(None if part is None else part.float() for part in (rotation, center))
    found = read_cache(*parts, *of, f"int{bits}/row/zero", width, torch.float32)
    step = parts[1].double()  # a value is within a step of its code, in the space where it was rounded
    assert found.shape == x.shape
    lost = (found.double() - x) if rotation is None else (found.double() - x) @ rotation
    assert (lost.abs() <= 1.01 * step + 1e-3 * kept.abs().amax(-1, keepdim=True).double() + 1e-6).all()


@pytest.mark.parametrize(
    "place,value,says",
    [
        (0, torch.zeros(1, 2, 5, 16), "codes is float32"),
        (0, torch.zeros(1, 2, 5, 7, dtype=torch.uint8), "codes is uint8"),
        (1, torch.zeros(1, 2, 5, 1), "scale is float32"),
        (2, torch.zeros(1, 2, 4, 1, dtype=torch.uint8), "zero is uint8"),
        (3, torch.zeros(8, 8), "rotation is float32"),
        (4, torch.zeros(2, 16), "center is float32"),
        (5, "int8/row", "format is"),
    ],
)
def test_what_it_does_not_take_is_refused(place, value, says):
    call = [*stored(torch.randn(1, 2, 5, 16), 4), None, None, "int4/row/zero", 16, torch.float32]
    call[place] = value
    with pytest.raises(ValueError, match=f"qcompile::read_cache: {says}"):
        read_cache(*call)
    with pytest.raises(ValueError, match=f"qcompile::read_cache: {says}"), FakeTensorMode() as mode:
        read_cache(*(mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in call))


def test_the_operator_is_well_behaved():
    basis = torch.eye(16), torch.zeros(2, 1, 16)
    call = (*stored(torch.randn(1, 2, 5, 16), 8), *basis, "int8/row/zero", 16, torch.float32)
    torch.library.opcheck(read_cache, call, test_utils=("test_schema", "test_faketensor"))
