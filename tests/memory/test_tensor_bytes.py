"""Bytes of tensors go to files and back, however few a call of the system moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.memory.fingerprint import as_bytes
from qcompile.memory.tensor_bytes import read_values, write_values

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64]


class Slow:
    """A file that moves a few bytes at a time, and as many as it likes."""

    def __init__(self, data=b"", step=3):
        self.data, self.step, self.place = bytearray(data), step, 0

    def write(self, view):
        part = bytes(view[: self.step])
        self.data += part
        return len(part)

    def readinto(self, view):
        part = self.data[self.place : self.place + min(self.step, len(view))]
        view[: len(part)] = part
        self.place += len(part)
        return len(part)


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.booleans())
def test_what_is_written_is_read(dtype, shape, step, transposed):
    tensor = (torch.randn(shape) * 9).to(dtype)
    tensor = tensor.transpose(0, -1) if transposed and len(shape) > 1 else tensor
    file = Slow(step=step)
    write_values(file, tensor)
    assert bytes(file.data) == as_bytes(tensor.contiguous()).numpy().tobytes()
    found = read_values(Slow(file.data, step), torch.empty(tensor.shape, dtype=dtype, device="meta"))
    assert found.dtype == dtype and found.shape == tensor.shape
    assert torch.equal(as_bytes(found), as_bytes(tensor.contiguous()))


def test_it_reads_from_where_the_file_stands(tmp_path):
    path = tmp_path / "x.bin"
    first, second = torch.arange(6.0), torch.arange(4).to(torch.int16)
    with path.open("wb", buffering=0) as raw:
        write_values(raw, first)
        write_values(raw, second)
    with path.open("rb", buffering=0) as raw:
        raw.seek(first.nbytes)
        assert torch.equal(read_values(raw, second), second)


def test_a_file_that_ends_before_says_after_how_many_bytes(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(10))
    with path.open("rb", buffering=0) as raw, pytest.raises(EOFError, match="ends after 10 of 12 bytes"):
        read_values(raw, torch.empty(3))
