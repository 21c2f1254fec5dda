"""int8 matmul: exact on every processor."""

from __future__ import annotations

import pytest
import torch

from qcompile.numerics import int8_matmul


@pytest.mark.parametrize("columns", [1, 96, 1024, 1025, 3000])
@pytest.mark.parametrize("fast", [False, True])
def test_sums_are_exact_on_every_kind_of_processor(monkeypatch, columns, fast):
    """The largest integers, with and without 8-bit dot products: float32 sums stay below 2^24."""
    monkeypatch.setattr(int8_matmul, "has_fast_int8_matmul", lambda: fast)
    x = torch.tensor([-128, -128, -127, 127], dtype=torch.int8)[torch.randint(4, (20, columns))]
    w = torch.tensor([-128, -128, 127, -127], dtype=torch.int8)[torch.randint(4, (33, columns))]
    x[0], w[0] = -128, -128  # the largest sum of all
    x[1], w[1] = 127, 127  # and an odd one, which float32 does not have beyond 2^24
    x[1, 0] = 127 if columns % 2 else 126
    x[2], w[2] = -128, -128
    x[2, 0], w[2, 0] = 1, 1  # odd, and in one block beyond 2^24 if that had one column more
    want = (x.double() @ w.double().t()).int()
    assert torch.equal(int8_matmul.int8_matmul(x, w), want)
    assert torch.equal(int8_matmul.int8_matmul(x.t().contiguous().t()[:1], w), want[:1])
    lone = torch.empty_strided((1, columns), (7, 1), dtype=torch.int8).copy_(x[:1])
    assert torch.equal(int8_matmul.int8_matmul(lone, w), want[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int8_matmul.int8_matmul(x, w), want)
    assert int8_matmul.int8_matmul(x[:0], w).shape == (0, 33)


def test_buffers_may_hold_anything():
    """What is in a workspace before a call does not matter, and it is requested by name, size and dtype."""
    x, w = (torch.randint(-128, 128, (n, 2500), dtype=torch.int8) for n in (3, 5))
    names = []

    def workspace(name, rows, columns, dtype):
        names.append(name)
        return torch.full((rows, columns), 77, dtype=dtype)

    out = torch.full((3, 5), -1, dtype=torch.int32)
    found = int8_matmul.int8_matmul_as_float(x.float(), w, out, workspace)
    assert found is out and torch.equal(out.long(), x.long() @ w.long().t())
    assert set(names) == {"product", "converted", "weight"}


def test_the_processor_follows_from_its_instructions(monkeypatch):
    for said, kind, fast in (
        (dict(amx_int8=True, avx512_vnni=True), "amx", True),
        (dict(avx512_vnni=True, avx2=True), "vnni", True),
        (dict(avx_vnni=True, avx2=True), "avx2", False),  # torch asks for those of AVX-512
        (dict(avx2=True, amx_tile=True), "avx2", False),
        (dict(neon=True), "other", False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda said=said: said)
        int8_matmul.processor.cache_clear()
        assert (int8_matmul.processor(), int8_matmul.has_fast_int8_matmul()) == (kind, fast)
    int8_matmul.processor.cache_clear()


@pytest.mark.parametrize("fast", [False, True])
def test_sums_of_nothing_are_zero(monkeypatch, fast):
    monkeypatch.setattr(int8_matmul, "has_fast_int8_matmul", lambda: fast)
    x, w = torch.zeros(3, 0, dtype=torch.int8), torch.zeros(5, 0, dtype=torch.int8)
    assert torch.equal(int8_matmul.int8_matmul(x, w), torch.zeros(3, 5, dtype=torch.int32))
    out = torch.full((3, 5), 7, dtype=torch.int32)
    assert not int8_matmul.int8_matmul_as_float(x.float(), w, out).any()


@pytest.mark.parametrize(
    "x,w,says",
    [
        (torch.zeros(3, 8, dtype=torch.int8), torch.zeros(5, 9, dtype=torch.int8), r"\(3, 8\) and weight \(5, 9\)"),
        (torch.zeros(8, dtype=torch.int8), torch.zeros(5, 8, dtype=torch.int8), r"needs \[M, K\]"),
        (torch.zeros(3, 8, dtype=torch.int8), torch.zeros(8, dtype=torch.int8), r"weight \(8,\)"),
        (torch.zeros(3, 8), torch.zeros(5, 8, dtype=torch.int8), "x is torch.float32"),
        (torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(1, 2**17, dtype=torch.int8), "up to 131071"),
    ],
)
def test_what_does_not_fit_is_refused(x, w, says):
    with pytest.raises(ValueError, match=says):
        int8_matmul.int8_matmul(x, w)
