"""QuantizeKV in a graph: static scales, agreement with the module's cache, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from zoo import build, example

import qcompile
from qcompile.analysis.attention_scores import attention_matmuls
from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.passes.kv_cache.quantize_kv import quantize_kv, static_scale
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError
from qcompile.testing import Decoder, Shape, decoders, rotary

DECODERS = ["llama", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "bloom", "mixtral"]


@pytest.mark.slow
@given(decoders())
@settings(max_examples=20)
def test_static_scales_hold_at_every_position(model):
    """A token that is repeated makes the same key everywhere but for its rotation: two of them must do for forty."""
    for shape in (model.shape, dataclasses.replace(model.shape, qk_norm=True)):
        decoder = Decoder(shape)
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
            if shape.rotary == "none":
                assert torch.allclose(keys, peak), "nothing is rotated: no need for larger scales"
            assert torch.allclose(values, long.cached[product.values.name] / 127)


def test_a_static_scale_is_the_norm_of_what_mixes_in_a_head():
    absmax = torch.tensor([[3.0, 1.0, 4.0, 0.0], [6.0, 2.0, 8.0, 0.0]])
    mixed = torch.tensor([[0, 1, 0, 3], [0, 1, 0, 3]])  # the same labels in both heads, which do not mix
    want = torch.tensor([[5.0, 1.0, 5.0, 1.0], [10.0, 2.0, 10.0, 1.0]]) / 127
    assert torch.allclose(static_scale(absmax, mixed), want)
    assert torch.allclose(static_scale(absmax)[:, :3], absmax[:, :3] / 127)


CACHES = {
    "tokens": QuantizeKV(4, hadamard=True, sink_tokens=1),
    "centered": QuantizeKV(4, hadamard=True, sink_tokens=1, center=True),
    "channels": QuantizeKV(8, static=True),
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
