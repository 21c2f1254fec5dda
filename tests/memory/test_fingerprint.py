"""Fingerprints: the definition, and that any change of content, order, shape or dtype makes another one."""

from __future__ import annotations

import pytest
import torch

from qcompile.memory import fingerprint as fingerprint_module
from qcompile.memory.fingerprint import as_bytes, fingerprint


def weight(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flipped(tensor, byte, bit):
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[byte] ^= 1 << bit
    return other


def in_python(tensor):
    """The definition, with Python's integers."""
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    data += bytes(-len(data) % 8)
    whole, sums = 2**64, [0, 0]

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % whole
        return z ^ (z >> 31)

    for i in range(len(data) // 8):
        once = mix((int.from_bytes(data[8 * i : 8 * i + 8], "little") + (i + 1) * 0x9E3779B97F4A7C15) % whole)
        sums = [(sums[0] + once) % whole, (sums[1] + mix(once)) % whole]
    return "".join(f"{s:016x}" for s in sums)


@pytest.mark.parametrize("words", [3, 2**15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_fingerprint_is_its_definition(dtype, words, monkeypatch):
    monkeypatch.setitem(fingerprint_module.WORDS, "cpu", words)
    for shape in ((7, 5), (64,), (), (0, 4)):
        tensor = (weight(*shape, dtype=torch.float32) * 9).to(dtype)
        assert fingerprint(tensor) == f"{in_python(tensor)} {dtype} {shape} cpu"


def test_one_bit_makes_another():
    tensor = weight(5, 13)  # 130 bytes: the last word is not whole
    found = {fingerprint(flipped(tensor, byte, bit)) for byte in range(tensor.nbytes) for bit in range(8)}
    assert len(found) == 8 * tensor.nbytes and fingerprint(tensor) not in found


def test_another_order_makes_another():
    tensor = weight(16, 32)
    reordered = [tensor.flip(0), tensor.flip(1), tensor.roll(4, 1), tensor.roll(1, 0), tensor[torch.randperm(16)],
             tensor[:, torch.randperm(32)], tensor.t().contiguous().view(16, 32)]  # fmt: skip
    words = tensor.view(torch.int64)
    for i, j in ((0, 1), (0, 127), (17, 81)):
        swapped = words.clone().view(-1)
        swapped[[i, j]] = swapped[[j, i]]
        reordered.append(swapped.view(torch.bfloat16).view(16, 32))
    reordered += [(~words).view(torch.bfloat16), -tensor]
    assert len({fingerprint(t) for t in [tensor, *reordered]}) == len(reordered) + 1


def test_shape_dtype_and_place_count_but_not_strides():
    zeros = torch.zeros(4, 8)
    others = [zeros.view(8, 4), zeros.view(torch.int32), zeros.bfloat16(), torch.zeros(4, 9)]
    assert len({fingerprint(t) for t in [zeros, *others]}) == 5
    tensor = weight(6, 10)
    assert fingerprint(tensor.t()) == fingerprint(tensor.t().contiguous()) != fingerprint(tensor)
    assert fingerprint(tensor[1:]) == fingerprint(tensor[1:].clone())  # a view that starts within a word
    assert fingerprint(torch.nn.Parameter(tensor)) == fingerprint(tensor)


@pytest.mark.parametrize("strides", [(16,), (16, 1), (3, 16)])
def test_bytes_of_sizes_of_one_with_any_stride(strides):
    tensor = torch.arange(32.0).as_strided((1,) * len(strides), strides, 5)
    assert as_bytes(tensor).tolist() == as_bytes(torch.tensor([5.0])).tolist() == [0, 0, 160, 64]


def test_bytes_of_views_whose_signs_are_noted():
    values = torch.tensor([1 + 2j, 3 - 4j])
    for view in (values.conj(), values.conj().imag, values.conj()[1:]):
        assert view.is_conj() or view.is_neg()
        assert torch.equal(as_bytes(view), as_bytes(view.clone().resolve_conj().resolve_neg()))
        assert torch.equal(as_bytes(view).view(view.dtype), view)
