"""Kernels of a quantized cache in the interpreter: codes as the definition's, attention against float64."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE
from kv_caches import dequantized, empty_cache, exact_attention, filled_cache, quantized, random_states

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch.kv_attention import attend, attend_in_parts, splits_of, write_tokens
from qcompile.numerics.kv_words import key_codes, split_words, value_codes

CASES = [  # tokens, capacity, query heads, heads, positions, width, bits
    (200, 300, 8, 2, 1, 64, 4),
    (129, 256, 4, 4, 1, 128, 4),
    (64, 128, 8, 1, 1, 64, 8),
    (333, 400, 12, 1, 1, 64, 4),  # more rows than a program has
    (150, 256, 4, 2, 3, 64, 4),
    (1, 128, 2, 1, 1, 256, 8),
]


def relative_error(got, want):
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("tokens,capacity,query_heads,heads,positions,width,bits", CASES)
@pytest.mark.parametrize("splits", [1, 3])
def test_attention(tokens, capacity, query_heads, heads, positions, width, bits, splits):
    keys, values = (random_states(2, heads, tokens, width, seed=seed) for seed in (1, 2))
    query = random_states(2, query_heads, positions, width, seed=3).bfloat16() / 4
    cache = filled_cache(keys, values, capacity, bits)
    want = exact_attention(query, dequantized(keys, bits), dequantized(values, bits), width**-0.5)
    got = attend(query.to(DEVICE), cache, width**-0.5, splits=splits)
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert relative_error(got, want) < 4e-3  # the weights and the result are rounded to bfloat16


@pytest.mark.parametrize("window,cap", [(70, 0.0), (0, 5.0), (130, 2.0)])
@pytest.mark.parametrize("positions", [1, 2])
def test_windows_and_caps(window, cap, positions):
    keys, values = (random_states(1, 2, 300, 64, seed=seed) for seed in (1, 2))
    query = random_states(1, 4, positions, 64, seed=3).bfloat16()
    cache = filled_cache(keys, values, 384, 4)
    want = exact_attention(query, dequantized(keys, 4), dequantized(values, 4), 0.2, window, cap)
    for splits in (0, 1, 4):
        got = attend(query.to(DEVICE), cache, 0.2, window, cap, splits)
        assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("positions", [1, 2])
def test_a_mask_is_added_to_the_scores(positions):
    """Left padding of one sequence, and values that are no mask."""
    keys, values = (random_states(2, 2, 200, 64, seed=seed) for seed in (1, 2))
    query = random_states(2, 4, positions, 64, seed=3).bfloat16()
    cache = filled_cache(keys, values, 256, 4)
    mask = torch.randn(2, positions, 256, generator=torch.Generator().manual_seed(4))
    mask[1, :, :140] = float("-inf")
    mask[0, 0, 128:] = float("-inf")  # of a whole range
    scores = query.double() @ dequantized(keys, 4).repeat_interleave(2, 1).transpose(-1, -2) * 0.2
    weights = (scores + mask[:, None, :, :200].double()).softmax(-1)
    want = weights @ dequantized(values, 4).repeat_interleave(2, 1)
    for splits in (1, 2):
        got = attend(query.to(DEVICE), cache, 0.2, splits=splits, mask=mask.to(DEVICE))
        assert relative_error(got, want) < 4e-3


def test_scores_are_those_of_float32():
    """What is in front of codes in a product, 128 or 2176, is subtracted from its sum without a trace."""
    for bits in (4, 8):
        keys, values = (random_states(1, 1, 200, 64, seed=seed) for seed in (1, 2))
        query = random_states(1, 2, 1, 64, seed=3).bfloat16()
        _, weights = attend_in_parts(query.to(DEVICE), filled_cache(keys, values, 256, bits), 0.125, 0, 0.0, 2)
        scores = (query.double() @ dequantized(keys, bits).transpose(-1, -2) * 0.125)[0, :, 0]
        for part, tokens in ((0, slice(0, 128)), (1, slice(128, 200))):
            most, total = weights[part].double().cpu().unbind(-1)
            want = scores[:, tokens].logsumexp(-1) / math.log(2)
            assert float((most + total.log2() - want).abs().max()) < 2e-5 * float(scores.abs().max())


def test_values_are_those_of_float32():
    """Equal weights, and scales that bfloat16 holds: nothing is rounded until the result."""
    keys, values = torch.zeros(1, 1, 150, 64), torch.randint(0, 16, (1, 1, 150, 64)).float() - 7
    values[..., 0], values[..., 1] = -7, 8  # a scale of one
    query = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    parts, weights = attend_in_parts(query.to(DEVICE), filled_cache(keys, values, 256, 4), 1.0, 0, 0.0, 1)
    assert float(weights[0, 0, 1]) == 150
    torch.testing.assert_close(parts[0, 0].cpu(), values.sum((0, 1, 2)), rtol=1e-6, atol=2e-3)


def test_what_is_behind_the_last_token_does_not_count():
    keys, values = (random_states(1, 1, 256, 64, seed=seed) for seed in (1, 2))
    query = random_states(1, 2, 1, 64, seed=3).bfloat16().to(DEVICE)
    stale, clean = filled_cache(keys, values, 256, 4), filled_cache(keys[:, :, :77], values[:, :, :77], 256, 4)
    stale.length.fill_(77)
    assert torch.equal(attend(query, stale, 0.1), attend(query, clean, 0.1))


def test_tokens_that_did_not_fit_are_no_value():
    keys = random_states(1, 1, 128, 64)
    cache = filled_cache(keys, keys, 128, 4)
    query = random_states(1, 2, 1, 64, seed=3).bfloat16().to(DEVICE)
    before = [t.clone() for t in cache.arguments.values()]
    write_tokens(cache, keys[:, :, :1].to(DEVICE), keys[:, :, :1].to(DEVICE))
    write_tokens(cache, keys[:, :, :70].to(DEVICE), keys[:, :, :70].to(DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(before, cache.arguments.values(), strict=True))
    assert attend(query, cache, 0.1).isfinite().all()
    cache.length.fill_(129)
    assert attend(query, cache, 0.1).isnan().all()


@pytest.mark.parametrize("width,bits", [(64, 4), (64, 8), (128, 4), (256, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_written_codes_are_those_of_the_definition(width, bits, dtype):
    """Prompts and single tokens in any order, over the ends of pages."""
    counts = [70, 1, 1, 60, 2, 1, 64, 1]
    keys, values = (random_states(2, 2, sum(counts), width, seed=seed, dtype=dtype) for seed in (1, 2))
    keys[0, 0, 5], values[1, 1, 71] = 0, 3.5  # zeros; all channels alike
    cache, at = empty_cache(2, 2, width, 256, bits), 0
    for count in counts:
        new = (t[:, :, at : at + count].to(DEVICE) for t in (keys, values))
        write_tokens(cache, *new)
        at += count
        cache.length.fill_(at)
    for states, codes, words in (
        (keys, key_codes(cache.keys, bits), cache.key_scales),
        (values, value_codes(cache.values, bits), cache.value_scales),
    ):
        want, scale, zero = quantized(states, bits)
        assert torch.equal(codes[:, :, :at].cpu(), want)
        got_scale, got_zero = split_words(words[:, :, :at].cpu(), bits)
        assert torch.equal(got_scale, scale.float()) and torch.equal(got_zero, zero.float())
        assert not codes[:, :, at:].any() and not words[:, :, at:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_written_codes_over_others(bits):
    """After a crop the place of a token holds another one's codes."""
    states = [random_states(1, 1, 70, 64, seed=seed) for seed in (1, 2)]
    stale, clean = filled_cache(*states, 128, bits), empty_cache(1, 1, 64, 128, bits)
    for cache in (stale, clean):
        for at in range(3):
            cache.length.fill_(at)
            write_tokens(cache, *(states[1 - i][:, :, at : at + 1].to(DEVICE) for i in range(2)))
    assert torch.equal(value_codes(stale.values, bits)[:, :, :3], value_codes(clean.values, bits)[:, :, :3])
    others = value_codes(stale.values, bits)[:, :, 3:70].cpu()
    assert torch.equal(others, quantized(states[1], bits)[0][:, :, 3:])


def test_no_tokens_and_no_batch():
    cache = empty_cache(2, 1, 64, 128, 4)
    write_tokens(cache, *(torch.zeros(2, 1, 0, 64, device=DEVICE) for _ in range(2)))
    assert not cache.key_scales.any()
    query = torch.zeros(0, 2, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    assert attend(query, empty_cache(0, 1, 64, 128, 4), 1.0).shape == query.shape


def test_ranges_of_tokens_fill_the_gpu():
    assert splits_of(8, 32768, Gpu()) == 64 and splits_of(8 * 64, 32768, Gpu()) == 1
    assert splits_of(1, 128, Gpu()) == 1 and splits_of(1, 1024, Gpu()) == 2


@pytest.mark.slow
def test_the_jit_compiles_what_it_specializes():
    """On a driver without a GPU: sizes of one, which the JIT makes constants, and those that 16 does not divide."""
    script = Path(__file__).parents[1] / "launch_caches.py"
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, "90"], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = json.loads(done.stdout.splitlines()[-1])
    names = {"gemm_w4a8", "sum_k", "kv_write", "kv_read", "kv_decode", "kv_merge"}
    assert {one["name"] for one in launches} == names
    of_decode = [one for one in launches if one["name"] == "kv_decode"]
    assert len(of_decode) == 4 * 5 and all(one["constants"]["ASM"] is True for one in of_decode)
    assert any(one["constants"].get("window") == 1 for one in of_decode)
    assert {one["grid"][2] for one in of_decode} == {1, 2}  # sixteen heads are two blocks of rows
