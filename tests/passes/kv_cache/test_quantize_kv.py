"""QuantizeKV in a graph: static scales, agreement with the module's cache, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import shape as shape_of
from torch import nn
from zoo import build, example

import qcompile
from qcompile.analysis.attention_scores import attention_matmuls
from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_rotation
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.passes.kv_cache.quantize_kv import quantize_kv, served_scale, static_scale
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import registered
from qcompile.recipe.rule import RecipeError
from qcompile.testing import Decoder, Shape, decoders, rotary

DECODERS = ["llama", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "bloom", "mixtral"]


@pytest.mark.slow
@given(decoders(), st.booleans())
@settings.get_profile("models")
def test_static_scales_hold_at_every_position(model, qk_norm):
    """A token that is repeated makes the same key everywhere but for its rotation: two of them must do for forty."""
    decoder = Decoder(dataclasses.replace(model.shape, qk_norm=qk_norm))
    program = capture(decoder, (decoder.example(),)).widened()
    same = torch.full((1, 40), 3)
    short, long = (observe(program, [[same[:, :length]]]) for length in (2, 40))
    attentions = attention_matmuls(program)
    attempt = program.copy()
    found = quantize_kv(attempt, QuantizeKV(8, static=True), PassContext.of(attempt, statistics=short)).constants
    for index, product in enumerate(attentions):
        keys, values = found.key_scales[index], found.value_scales[index]
        peak = long.cached[product.keys.name] / 127
        assert (peak <= 1.0001 * keys).all(), "a key is cut off"
        if model.shape.rotary == "none":
            assert torch.allclose(keys, peak), "nothing is rotated: no need for larger scales"
        assert torch.allclose(values, long.cached[product.values.name] / 127)


def test_a_static_scale_is_the_norm_of_what_mixes_in_a_head():
    absmax = torch.tensor([[3.0, 1.0, 4.0, 0.0], [6.0, 2.0, 8.0, 0.0]])
    mixed = torch.tensor([[0, 1, 0, 3], [0, 1, 0, 3]])  # the same labels in both heads, which do not mix
    want = torch.tensor([[5.0, 1.0, 5.0, 1.0], [10.0, 2.0, 10.0, 1.0]]) / 127
    assert torch.allclose(static_scale(absmax, mixed), want)
    assert torch.allclose(static_scale(absmax)[:, :3], absmax[:, :3] / 127)


def test_scales_of_servers_are_of_a_layer_or_a_head_and_rounded_up_to_bfloat16():
    absmax = torch.tensor([[3.0, 1.0, 4.0, 0.0], [6.0, 2.0, 8.0, 0.0]])
    mixed = torch.tensor([[0, 1, 0, 3], [0, 1, 0, 3]])
    for per, peaks in (("tensor", [10, 10]), ("head", [5, 10])):
        found = served_scale(absmax, mixed, per)
        assert found.shape == (2, 4) and found.dtype == torch.float32 and torch.equal(found, found[:, :1].expand(2, 4))
        exact = torch.tensor(peaks) / 448
        assert torch.equal(found[:, 0], found[:, 0].bfloat16().float()) and bool((found[:, 0] >= exact).all())
        assert bool((found[:, 0] <= exact * (1 + 2**-7)).all())
    many = torch.linspace(0.1, 9, 200)[:, None]
    short = served_scale(many, None, "head").bfloat16()
    below = (short.view(torch.int16) - 1).view(torch.bfloat16).float()
    assert bool((short.float() >= many / 448).all()) and bool((below < many / 448).all()), "the least that is as large"
    powers = served_scale(torch.tensor([[448.0], [224.0]]), None, "head")
    assert powers.tolist() == [[1.0], [0.5]], "values of bfloat16 stay"
    assert served_scale(torch.tensor([[0.0, 0.0], [448.0, 0.0]]), None, "head").tolist() == [[1.0] * 2, [1.0] * 2]


@pytest.mark.parametrize("bad", [dict(fp8="row", static=True), dict(fp8="tensor"), dict(fp8="head", bits=4)])
def test_e4m3_codes_have_static_scales_of_a_layer_or_a_head(bad):
    with pytest.raises(RecipeError, match="QuantizeKV: fp8=.*Fix: QuantizeKV.8, static=True, fp8='tensor'"):
        QuantizeKV(**{"bits": 8, **bad})


class Attentions(nn.Module):
    """Two attentions whose heads differ in number and size; `change` may replace keys and values of each."""

    def __init__(self, decomposed=False):
        super().__init__()
        self.decomposed, self.heads = decomposed, (2, 1)
        self.parts = nn.ModuleList(nn.Linear(8, 24) for _ in self.heads)

    def forward(self, x, change=lambda layer, k, v: (k, v)):
        for layer, heads in enumerate(self.heads):
            split = self.parts[layer](x).split(8, -1)
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in split)
            k, v = change(layer, k, v)
            if self.decomposed:
                y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
            else:
                y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = torch.tanh(y.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize(
    "config, decomposed, dtype",
    [
        (QuantizeKV(4), True, torch.float32),
        (QuantizeKV(8, sink_tokens=2), False, torch.bfloat16),
        (QuantizeKV(4, hadamard=True, center=True, sink_tokens=1), True, torch.float32),
        (QuantizeKV(8, static=True), False, torch.bfloat16),
        (QuantizeKV(8, static=True), True, torch.float32),
        (QuantizeKV(8, static=True, fp8="tensor"), False, torch.bfloat16),
        (QuantizeKV(8, static=True, fp8="head"), True, torch.float32),
    ],
)
def test_keys_and_values_are_rounded_by_hand(config, decomposed, dtype):
    torch.manual_seed(0)
    model = Attentions(decomposed).to(dtype).requires_grad_(False)
    x = (torch.randn(2, 7, 8) + 0.5).to(dtype)
    program = capture(model, (x,))
    statistics = observe(program, [[x / 2]])  # half of what is read then
    attentions = [(a.node.name, a.keys.name, a.values.name) for a in attention_matmuls(program)]
    report = quantize_kv(program, config, PassContext.of(program, statistics=statistics))

    def change(layer, k, v):
        _, keys, values = attentions[layer]
        if config.fp8:
            peaks = [statistics.cached[name] for name in (keys, values)]
            scales = [served_scale(peak, None, config.fp8)[:, None] for peak in peaks]
            return [
                ((z.float() / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s).to(dtype)
                for z, s in zip((k, v), scales, strict=True)
            ]
        if config.static:
            scales = [static_scale(statistics.cached[name])[:, None] for name in (keys, values)]
            return [
                ((z.float() / s).round().clamp(-128, 127) * s).to(dtype) for z, s in zip((k, v), scales, strict=True)
            ]
        mean = statistics.key_means[keys][:, None] if config.center else 0
        matrix = random_rotation(k.shape[-1], 0)[0].float() if config.hadamard else torch.eye(k.shape[-1])
        rounded = quantize_tensor((k.float() - mean) @ matrix, config.format).dequantize() @ matrix.t() + mean
        values = quantize_tensor(v, config.format).dequantize()
        first = torch.arange(k.shape[-2])[:, None] < config.sink_tokens
        return torch.where(first, k, rounded.to(dtype)), torch.where(first, v, values.to(dtype))

    (found,), want = program(x), model(x, change)
    assert found.dtype == dtype and torch.allclose(found, want, atol=1e-5 if dtype == torch.float32 else 0.02)
    assert float((want - model(x)).norm()) > 1e-4, "the rounding is seen"
    assert report.done == [name for name, _, _ in attentions]
    sizes = [(2, 4), (1, 8)]
    assert [c.shape for c in report.constants.centers] == (sizes if config.center else [])
    assert [s.shape for s in report.constants.value_scales] == (sizes if config.static else [])


CACHES = {
    "tokens": QuantizeKV(4, hadamard=True, sink_tokens=1),
    "centered": QuantizeKV(4, hadamard=True, sink_tokens=1, center=True),
    "channels": QuantizeKV(8, static=True),
    "e4m3": QuantizeKV(8, static=True, fp8="head"),
}


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES.values(), ids=list(CACHES))
@pytest.mark.parametrize("name", DECODERS)
def test_the_module_and_the_graph_agree(name, cache):
    """QuantizeKV in a graph computes what the cache of the quantized module does."""
    recipe = Recipe("kv", (cache, Quantize(Format("int8"), None), Fuse()))
    model, inputs = build(name), example(name)
    program = capture(model, (), inputs)
    batches = [list(inputs.values())]
    graph, _ = run(program, recipe, example=batches[0], batches=lambda: batches)
    want = graph(*inputs.values())[:1]
    effect = relative_error(want, program(*inputs.values())[:1])
    qcompile.quantize(model, recipe, [inputs], progress=False)
    with torch.no_grad():
        got = model(**inputs, use_cache=False).logits
    # The cache holds scales in float16, so a code may flip at a tie.
    assert relative_error([got], want) < min(0.01, 0.3 * effect)


class _NormBehind(torch.nn.Module):
    """Keys that are normed after their rotation."""

    def __init__(self):
        super().__init__()
        self.inner = Decoder(Shape(12, 2, 1, 6, 12, 1, "rms", False, True, False, False, 0, rotary="half"))
        self.inner.blocks[0].key_norm = torch.nn.Identity()

    def forward(self, ids):
        block, s = self.inner.blocks[0], self.inner.shape
        x = self.inner.embedding(ids)
        q, k, v = (
            part(x).view(*ids.shape, heads, s.head).transpose(1, 2)
            for part, heads in ((block.query, 2), (block.key, 1), (block.value, 1))
        )
        k = rotary(k, "half")
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6)
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        return block.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_what_stands_behind_a_rotation_is_named():
    ids = torch.randint(0, 31, (2, 5))
    program = capture(_NormBehind().eval(), (ids,))
    context = PassContext.of(program, statistics=observe(program, [[ids]]))
    report = quantize_kv(program, QuantizeKV(8, static=True), context)
    assert "static scales hold for the positions of the calibration only" in report.notes[0]


@pytest.mark.parametrize("bad", [dict(bits=3), dict(sink_tokens=-1)])
def test_impossible_cache_formats_are_refused(bad):
    with pytest.raises(RecipeError, match="QuantizeKV: "):
        QuantizeKV(**bad)


@pytest.mark.parametrize("bad", [dict(bits=4), dict(hadamard=True), dict(center=True), dict(sink_tokens=1)])
def test_static_scales_stand_alone(bad):
    with pytest.raises(RecipeError, match="static scales are of 8 bits"):
        QuantizeKV(**{"bits": 8, **bad}, static=True)


def test_channels_that_a_rotary_embedding_mixes_share_a_scale_and_values_have_their_own():
    decoder = Decoder(shape_of(layers=1, rotary="half"))
    ids = decoder.example()
    program = capture(decoder, (ids,))
    statistics, (product,) = observe(program, [[ids]]), attention_matmuls(program)
    keys, values = (statistics.cached[node.name] for node in (product.keys, product.values))
    found = quantize_kv(program, QuantizeKV(8, static=True), PassContext.of(program, statistics=statistics)).constants
    pairs = torch.arange(8).remainder(4).expand(len(keys), -1)  # channels i and i + 4 of a head
    assert torch.equal(found.key_scales[0], static_scale(keys, pairs))
    assert torch.equal(found.value_scales[0], static_scale(values))


def test_the_format_has_the_bits_that_were_asked_for():
    assert [str(QuantizeKV(bits).format) for bits in (4, 8)] == ["int4/row/zero", "int8/row/zero"]


def test_statistics_are_requested_where_they_are_read():
    needs = registered()[QuantizeKV].needs
    assert [needs(QuantizeKV(8, **more)) for more in ({}, {"center": True}, {"static": True})] == [(), *[("keys",)] * 2]
