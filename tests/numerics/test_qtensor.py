"""Stored parts, splitting, dequantization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_formats import FORMATS

from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS, QTensor, unpack_codes
from qcompile.numerics.rounding import quantize_tensor
from qcompile.testing import weights


@given(weights(), st.sampled_from(FORMATS))
def test_codes_are_in_range_and_stored_losslessly(w, text):
    form = Format.parse(text)
    q = quantize_tensor(w, form)
    if not form.is_float:
        assert int(q.codes.min()) >= form.qmin and int(q.codes.max()) <= form.qmax
    back = unpack_codes(q.stored(), form, w.shape[1])
    assert torch.equal(back.float(), q.codes.float())
    assert q.stored().shape[1] == -(-w.shape[1] * form.bits // 8)


def test_ragged_last_group():
    w = torch.randn(3, 576)
    q = quantize_tensor(w, Format.parse("int4/group128"))
    assert q.scale.shape == (3, 5)
    tail = quantize_tensor(w[:, 512:], Format.parse("int4/group64"))
    assert torch.equal(q.dequantize()[:, 512:], tail.dequantize())


@given(weights(), st.sampled_from(FORMATS))
def test_stored_parts_are_read_back(w, text):
    form = Format.parse(text)
    q = quantize_tensor(w, form)
    back = QTensor.from_stored(q.stored_parts, form, w.shape[1])
    assert len(PARTS) == len(q.parts) and all(
        part is getattr(q, name) for name, part in zip(PARTS, q.parts, strict=True)
    )
    for mine, read in zip(q.parts, back.parts, strict=True):
        assert (mine is None) == (read is None)
        assert mine is None or (mine.dtype == read.dtype and torch.equal(mine.float(), read.float()))
    assert q.nbytes == sum(part.nbytes for part in q.stored_parts if part is not None)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("text", FORMATS)
def test_dequantized_values_are_scale_times_code_less_zero(text):
    """Value by value, of a matrix with a ragged last group."""
    form = Format.parse(text)
    q = quantize_tensor(torch.randn(3, 40) + 0.5, form)

    def value(row, column):
        group = column // form.group if form.per == "group" else 0
        code = float(q.codes[row, column])
        if form.dtype == "fp4":
            code = (-1 if code > 7 else 1) * E2M1[int(code) % 8]
        code -= 0 if q.zero is None else float(q.zero[row, group])
        scale = float(q.scale if form.per == "tensor" else q.scale[row, 0 if form.two_level else group])
        if form.dual:
            scale *= int(q.group_scale[row, group])
        return code * scale * (2.0 ** int(q.group_scale[row, group]) if form.powers else 1)

    want = torch.tensor([[value(row, column) for column in range(40)] for row in range(3)])
    assert torch.allclose(q.dequantize(), want, rtol=1e-6, atol=1e-7)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text", ["int4/group16/zero", "int8/row", "int8/tensor", "int4/group16/zero/dual", "fp4/group16/m2"]
)
def test_split_matrices_are_the_rows_of_the_whole(text):
    whole = quantize_tensor(torch.randn(7, 40), Format.parse(text))
    blocks = whole.split([4, 1, 2])
    assert [len(block.codes) for block in blocks] == [4, 1, 2]
    assert torch.equal(torch.cat([block.dequantize() for block in blocks]), whole.dequantize())
    assert all(block.codes.is_contiguous() for block in blocks)


@pytest.mark.parametrize(
    "text",
    ["int4/group{}", "int4/group{}/zero", "int4/group{}/floatzero", "int4/group{}/dual", "int4/group{}/zero/dual",
     "fp4/group{}/m2", "int3/group{}/zero", "int8/group{}/smooth"],
)  # fmt: skip
def test_a_group_beyond_the_row_is_not_padded(text):
    """2^50 columns would not fit into any memory."""
    w = torch.randn(4, 40)
    narrow, wide = (quantize_tensor(w, Format.parse(text.format(group))) for group in (40, 2**50))
    assert torch.equal(wide.dequantize(), narrow.dequantize()) and torch.equal(wide.stored(), narrow.stored())
    back = QTensor.from_stored(wide.stored_parts, wide.format, 40)
    assert torch.equal(back.dequantize(), narrow.dequantize())


@pytest.mark.parametrize("text", ["int4/group32/dual", "fp4/group32/m2"])
def test_missing_group_scales_are_refused(text):
    q = quantize_tensor(torch.randn(4, 64), Format.parse(text))
    with pytest.raises(ValueError, match="group_scale is None"):
        QTensor(q.codes, q.scale, None, None, q.format).dequantize()
