"""The quantized key/value cache: rounding, agreement of prefill and decode, beams, memory."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

from qcompile.modules.kv_cache import KVCache
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.recipe.certificate import relative_error

DECODERS = ["llama", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "bloom", "mixtral"]


def test_vectors_are_rounded_head_by_head_and_token_by_token():
    k, v = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    got_k, got_v = KVCache(4).update(k, v, 0)
    want = quantize_tensor(k, Format.parse("int4/row/zero")).dequantize()
    assert torch.allclose(got_k, want, atol=2e-3) and not torch.allclose(got_k, k, atol=1e-2)
    assert (got_v - v).abs().max() < (v.amax(-1) - v.amin(-1)).max() / 15


def test_appending_in_pieces_is_appending_at_once():
    k, v = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    whole, pieces = KVCache(4, hadamard=True, sink_tokens=3), KVCache(4, hadamard=True, sink_tokens=3)
    want = whole.update(k, v, 0)
    for start in range(0, 40, 7):
        got = pieces.update(k[:, :, start : start + 7], v[:, :, start : start + 7], 0)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(got[0][:, :, :3], k[:, :, :3]) and not torch.equal(got[0][:, :, 3], k[:, :, 3])
    assert pieces.get_seq_length() == 40


def test_a_hadamard_helps_keys_with_an_outlier_channel():
    k = torch.randn(1, 1, 32, 64)
    k[..., 5] *= 30
    errors = [(KVCache(4, hadamard=h).update(k, k, 0)[0] - k).norm() for h in (False, True)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("hadamard", [False, True])
def test_subtracting_the_mean_key_gives_the_scales_of_what_remains(hadamard):
    """Each head and channel has a mean of its own, far above the differences between tokens."""
    mean = 20 * torch.randn(3, 64)
    k = torch.randn(2, 3, 32, 64) + mean[:, None]
    plain, centered = KVCache(4, hadamard=hadamard), KVCache(4, hadamard=hadamard, centers=[mean, mean])
    for layer in range(2):
        errors = [(cache.update(k, k, layer)[0] - k).abs().max() for cache in (plain, centered)]
        assert errors[1] < 0.5 < 1 < errors[0]
        assert torch.equal(
            plain.layers[layer].own_values.read(k.dtype), centered.layers[layer].own_values.read(k.dtype)
        )


def test_channels_are_rounded_with_their_static_scales():
    scale = torch.rand(2, 16) + 0.5
    k = torch.randn(3, 2, 40, 16) * 127 * scale[:, None] / 4
    k[0, 1, 7, 3] = 1000.0  # beyond the range: the largest code
    whole, pieces = KVCache(8, scales=[(scale, 2 * scale)]), KVCache(8, scales=[(scale, 2 * scale)])
    keys, values = whole.update(k, k, 0)
    inside = k.abs() <= 127 * scale[:, None]
    assert ((keys - k).abs() <= 0.5001 * scale[:, None])[inside].all() and keys[0, 1, 7, 3] == 127 * scale[1, 3]
    assert torch.equal(values, (k / (2 * scale[:, None])).round().clamp(-128, 127) * 2 * scale[:, None])
    for start in range(0, 40, 7):
        got = pieces.update(k[:, :, start : start + 7], k[:, :, start : start + 7], 0)
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    assert whole.nbytes == 2 * k.numel() and whole.float_nbytes() == 2 * whole.nbytes
    whole.reorder_cache(torch.tensor([2, 0, 0]))
    whole.crop(-4)
    again, _ = whole.update(k[:, :, :1], k[:, :, :1], 0)
    assert torch.equal(again[:, :, :36], keys[[2, 0, 0], :, :36]) and again.shape[2] == 37


@pytest.mark.parametrize("bits, share", [(4, 0.35), (8, 0.6)])
def test_memory(bits, share):
    cache = KVCache(bits)
    cache.update(torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64), 0)
    assert cache.nbytes < share * cache.float_nbytes()
    assert cache.float_nbytes() == 2 * 2 * 100 * 64 * 2


def test_beams_and_cropping():
    cache = KVCache(4)
    k = torch.randn(3, 2, 9, 8)
    before, _ = cache.update(k, k, 0)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-4)
    after, _ = cache.update(k[:, :, :1], k[:, :, :1], 0)
    assert torch.equal(after[:, :, :5], before[[2, 0, 0], :, :5]) and after.shape[2] == 6
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_and_decode_agree(name):
    model, ids = build(name), example(name)["input_ids"]
    with torch.no_grad():
        float_logits = model(input_ids=ids).logits
        whole = model(input_ids=ids, past_key_values=KVCache(4, hadamard=True), use_cache=True).logits
        cache = KVCache(4, hadamard=True)
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(8)]
    assert relative_error([torch.cat(steps, 1)], [whole]) < 1e-4
    assert 1e-4 < relative_error([whole], [float_logits]) < 0.2


def test_e4m3_codes_with_static_scales():
    scale = torch.tensor([[0.5], [0.25]]).expand(2, 16)
    k = torch.randn(3, 2, 40, 16) * 30
    k[0, 1, 7, 3] = 1000.0  # beyond the range: the largest code
    cache = KVCache(8, scales=[(scale, 2 * scale)], fp8=True)
    keys, values = cache.update(k, k, 0)
    for found, s in ((keys, scale), (values, 2 * scale)):
        s = s[:, None]
        assert torch.equal(found, (k / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s)
    assert keys[0, 1, 7, 3] == 112 and cache.nbytes == 2 * k.numel()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-4)
    again, _ = cache.update(k[:, :, :1], k[:, :, :1], 0)
    assert torch.equal(again[:, :, :36], keys[[2, 0, 0], :, :36]) and again.shape[2] == 37
    with pytest.raises(ValueError, match="fp8 codes need static scales. Fix: give scales"):
        KVCache(8, fp8=True)


@pytest.mark.parametrize("bad", [dict(bits=3), dict(sink_tokens=-1)])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ValueError):
        KVCache(**bad)


@pytest.mark.parametrize("bad", [dict(bits=4), dict(hadamard=True), dict(sink_tokens=1), dict(centers=[])])
def test_static_scales_exclude_other_options(bad):
    with pytest.raises(ValueError, match="static scales go with 8 bits"):
        KVCache(**{"bits": 8, **bad}, scales=[])
