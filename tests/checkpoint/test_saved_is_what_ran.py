"""A loaded model computes bit by bit what the saved one did: any recipe, dtype and wrapper, copies and pickles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from zoo import brief, build, example

import qcompile
from qcompile.numerics.format import Format
from qcompile.passes import FoldNorm, Fuse, OnlineHadamard, Quantize, QuantizeKV, Rotate, Untie
from qcompile.pipeline.presets import PRESETS
from qcompile.recipe.recipe import Recipe

INT4 = Recipe("w4", (Quantize(Format.parse("int4/group32/zero"), None), Fuse()))


def quantized(name="llama", recipe="int8"):
    model = build(name)
    qcompile.quantize(model, recipe, [example(name)], progress=False)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["int8", "w4a16-rotated"])
def test_a_model_that_was_cast_computes_the_same(recipe, dtype, tmp_path):
    """Casting rounds the tables of positions, which no state_dict has."""
    model, inputs = build("llama").to(dtype), example("llama")
    qcompile.quantize(model, recipe, [inputs], progress=False)
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    buffers = dict(model.named_buffers())
    assert all(b.dtype == buffers[n].dtype and torch.equal(b, buffers[n]) for n, b in again.named_buffers())
    filled = qcompile.load(tmp_path / "m", build("llama"))
    assert torch.equal(logits(filled, inputs), logits(model, inputs))


SMALL = dict(vocab_size=128, num_attention_heads=4, intermediate_size=128, max_position_embeddings=64)
OTHERS = {
    "positions that are a buffer": lambda: tf.XGLMForCausalLM(
        tf.XGLMConfig(
            vocab_size=128, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, max_position_embeddings=64
        )
    ),
    "norms without a gain": lambda: tf.DiffLlamaForCausalLM(
        tf.DiffLlamaConfig(hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, **SMALL)
    ),
    "layers that are shared": lambda: tf.AlbertModel(
        tf.AlbertConfig(hidden_size=64, embedding_size=32, num_hidden_layers=2, **SMALL)
    ),
}


@pytest.mark.parametrize("recipe", ["w8a16", "int8-rotated"])
@pytest.mark.parametrize("name", OTHERS)
def test_models_with(name, recipe, tmp_path):
    torch.manual_seed(0)
    model, inputs = OTHERS[name]().eval(), example("llama")
    qcompile.quantize(model, recipe, [inputs], progress=False)
    qcompile.save(model, tmp_path / "m")
    assert torch.equal(logits(qcompile.load(tmp_path / "m"), inputs), logits(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [name for name in PRESETS if name != "w4a16-finequant"])
def test_every_preset(recipe, dtype, tmp_path):
    model, inputs = build("llama").to(dtype), example("llama")
    qcompile.quantize(model, brief(PRESETS[recipe]), [inputs], progress=False)
    qcompile.save(model, tmp_path / "m")
    assert torch.equal(logits(qcompile.load(tmp_path / "m"), inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_copies_pickles_and_state_dicts(name, tmp_path):
    model, inputs = build(name), example(name)
    recipe = Recipe("x", (Untie(), FoldNorm(), Rotate(), OnlineHadamard(), QuantizeKV(8), *INT4.passes))
    qcompile.quantize(model, recipe, [inputs], progress=False)
    expected = logits(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))]
    torch.save(model, tmp_path / "model.pt")
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for again in copies:
        assert torch.equal(logits(again, inputs), expected) and again.state_dict().keys() == model.state_dict().keys()
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert not {id(t) for t in again.buffers()} & {id(t) for t in model.buffers()}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copies[0]
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name_, buffer in model.named_buffers():  # computed ones are in no state_dict
        if name_ not in model.state_dict():
            other.get_buffer(name_).copy_(buffer)
    assert torch.equal(logits(other, inputs), expected)


def test_a_wrapped_model_is_saved_without_its_wrapper(tmp_path):
    model, inputs = quantized("llama", "w8a16"), example("llama")
    qcompile.save(torch.compile(model, backend="eager"), tmp_path / "m")
    wrapped = torch.compile(build("llama"), backend="eager")
    assert qcompile.load(tmp_path / "m", wrapped) is wrapped
    for again in (qcompile.load(tmp_path / "m"), wrapped._orig_mod):
        assert torch.equal(logits(again, inputs), logits(model, inputs))
