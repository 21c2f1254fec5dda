"""Codes go into an int8 cache and come out of it as a decoder's module rounds them."""

from __future__ import annotations

import torch

from qcompile.codegen.onnx.tracing.int8_cache import close_cache, open_cache

SCALES = [(torch.rand(2, 8) / 20 + 0.01, torch.rand(2, 8) / 20 + 0.01) for _ in range(2)]


def past(length, scales):
    shape = (1, 2, length, 8)
    generator = torch.Generator().manual_seed(0)
    if scales is None:
        return [torch.randn(shape, generator=generator) for _ in range(4)]
    return [torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for _ in range(4)]


def test_codes_come_back_as_they_went_in():
    codes = past(5, SCALES)
    for got, want in zip(close_cache(open_cache(codes, SCALES, rounds=True), SCALES), codes, strict=True):
        assert got.dtype is torch.int8 and torch.equal(got, want)
    for got, want in zip(close_cache(open_cache(codes, SCALES, rounds=False), SCALES), codes, strict=True):
        assert got.dtype is torch.float32 and torch.allclose(got, want.float(), atol=1e-4)


def test_new_keys_and_values_are_rounded_or_not():
    new = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    for rounds in (True, False):
        cache = open_cache(past(5, SCALES), SCALES, rounds)
        for layer in range(2):
            cache.update(*new, layer)
        for index, part in enumerate(close_cache(cache, SCALES)):
            scale = SCALES[index // 2][index % 2][:, None]
            units = new[index % 2] / scale
            want = units.round().clamp(-128, 127) if rounds else units
            assert part.shape[2] == 8 and torch.allclose(part[:, :, 5:].float(), want, atol=1e-3)


def test_a_float_cache_is_not_changed():
    floats = past(5, None)
    assert all(map(torch.equal, close_cache(open_cache(floats, None, rounds=True), None), floats))
