"""model.dequantize(): a float model that computes what a weight-only one did, and is saved as one."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn
from zoo import build, example

import qcompile
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantConv
from qcompile.passes import FoldNorm, Fuse, OnlineHadamard, Quantize, Rotate, Untie
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule
from qcompile.transformers_plugin.dequantize_model import dequantize_model, float_module

QUANTIZED = QuantLinear | QuantStack | RotatedLinear
ONLINE = (
    Untie(),
    FoldNorm(),
    Rotate(),
    OnlineHadamard(),
    Quantize(qcompile.Format.parse("int4/group32"), None),
    Fuse(),
)


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("llama", "w4a16"),
        ("llama", "w4a16-lorc"),
        ("mixtral", "w8a16"),
        ("llama", Recipe("online", ONLINE)),
        ("gpt2", Recipe("kept", ONLINE, (Rule("*mlp.c_proj*", keep=True),))),
        ("llama", Recipe("kept", ONLINE, (Rule("*down_proj*", keep=True),))),
    ],
    ids=["group", "low rank", "experts", "online", "kept, [K, N]", "kept"],
)
def test_weights_are_what_the_codes_stand_for(name, recipe, tmp_path):
    build(name).save_pretrained(tmp_path / "float")
    model = type(build(name)).from_pretrained(
        tmp_path / "float", quantization_config=qcompile.QCompileConfig(recipe, [example(name)])
    )
    expected = output(model, example(name))
    assert model.dequantize() is model and not hasattr(model.config, "quantization_config")
    assert not any(isinstance(module, QUANTIZED) for module in model.modules())
    assert not getattr(model, "is_quantized", False)
    assert torch.allclose(output(model, example(name)), expected, atol=2e-5)


def test_it_is_a_model_of_transformers_again(tmp_path):
    """Also after a reload, where every name of its class has its tensor."""
    model = build("mistral")
    qcompile.quantize(model, "w4a8kv4", [example("mistral")], progress=False)
    model.save_pretrained(tmp_path / "m")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").dequantize()
    assert "save_pretrained" not in vars(again) and not hasattr(again, "qcompile_recipe")
    assert type(again(**example("mistral")).past_key_values) is tf.DynamicCache
    again.save_pretrained(tmp_path / "float")
    assert (tmp_path / "float/model.safetensors").is_file()
    plain, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(output(plain, example("mistral")), output(again, example("mistral")))


def test_with_other_norms_it_is_still_saved_as_ours(tmp_path):
    """Folding left norms that the class does not have: transformers would build others."""
    build("opt").save_pretrained(tmp_path / "float")
    config = qcompile.QCompileConfig("w4a16-rotated", [example("opt")])
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).dequantize()
    expected = output(model, example("opt"))
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(output(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m"), example("opt")), expected)


def test_the_dtype_of_the_weights():
    model = build("llama")
    qcompile.quantize(model, "w8a16", [example("llama")], progress=False)
    expected = output(model, example("llama"))
    half = dequantize_model(model, torch.bfloat16)
    assert {type(half.lm_head), half.lm_head.weight.dtype} == {nn.Linear, torch.bfloat16}
    assert torch.allclose(output(half.float(), example("llama")), expected, atol=0.05)


def test_a_module_in_two_places_stays_one():
    model = tf.AlbertModel(
        tf.AlbertConfig(
            hidden_size=64,
            embedding_size=32,
            intermediate_size=64,
            vocab_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()
    qcompile.quantize(model, "w8a16", [example("llama")], progress=False)
    model.again = model.encoder.embedding_hidden_mapping_in
    assert isinstance(model.again, QuantLinear)
    dequantize_model(model)
    assert type(model.again) is nn.Linear and model.again is model.encoder.embedding_hidden_mapping_in


def test_a_settled_convolution():
    model = nn.Sequential(*(nn.Conv1d(4, 4, 3, padding=1, groups=2) for _ in range(3)))
    x = torch.randn(2, 4, 9)
    qcompile.train(model, "int4-train", example=x, progress=False)
    model(x).sum().backward()
    qcompile.settle(model)
    settled = model[1]
    assert isinstance(settled, StaticQuantConv)
    plain = float_module(settled, torch.float32)
    assert type(plain) is nn.Conv1d and torch.equal(plain.weight, settled.weight)
    codes = torch.arange(-3, 4).repeat(8)[:48].view(2, 4, 6) * settled.act_scale  # values that rounding keeps
    codes = codes.clamp(settled.low * settled.act_scale, settled.high * settled.act_scale)
    assert torch.allclose(plain(codes), settled(codes), atol=1e-5)
