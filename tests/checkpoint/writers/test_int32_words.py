"""Words of codes, against the package that reads them."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from qcompile.checkpoint.writers.int32_words import pack_words, unsigned_codes, unsigned_stream, words
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import pack_codes


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**20))
def test_words_are_those_of_compressed_tensors(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    signed = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=generator).to(torch.int8)
    unsigned = (signed.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    assert torch.equal(pack_words(unsigned, bits), pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(pack_words(unsigned, bits), bits, signed.shape), signed)
    along_rows = pack_words(unsigned.t().contiguous(), bits).t()
    assert torch.equal(along_rows, pack_to_int32(signed, bits, packed_dim=0))


@given(st.sampled_from(["int2/row", "int3/row/zero", "int4/row", "int4/row/zero", "int8/row", "int8/row/zero"]))
def test_stored_codes_become_unsigned_ones(text):
    form = Format.parse(text)
    codes = torch.arange(form.qmin, form.qmax + 1).to(form.code_dtype)[None].repeat(2, 1)
    stored = pack_codes(codes, form)
    assert unsigned_codes(stored, form, codes.shape[1]).tolist() == [list(range(1 << form.bits))] * 2
    assert unsigned_stream(stored, form).dtype == torch.uint8


def test_words_are_padded_with_zeros():
    assert words(torch.tensor([[1, 2, 3, 4, 255]], dtype=torch.uint8)).tolist() == [[0x04030201, 255]]
