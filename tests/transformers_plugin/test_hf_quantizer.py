"""from_pretrained quantizes as `quantize` does, and a folder opens as the model that was saved, bit for bit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from zoo import ARCHITECTURES, ZOO, build, example

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.modules.kv_cache import KVCache
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.passes import FoldNorm, Untie
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

SCHEMA1 = Path(__file__).parents[1] / "data/schema1"


def output(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)[0]


def on_load(name, recipe, folder, dtype=torch.float32, **options):
    """A float model of the zoo, from a folder, and what from_pretrained makes of that folder."""
    build(name).to(dtype).save_pretrained(folder)
    model = type(build(name)).from_pretrained(folder)
    config = qcompile.QCompileConfig(recipe, [example(name)])
    return model, type(model).from_pretrained(folder, quantization_config=config, **options)


def reopened(model, folder, shard="60KB"):
    """The model from its folder; every tensor had a place and every place a tensor."""
    model.save_pretrained(folder, max_shard_size=shard)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return again


OTHER_RECIPES = [
    "int8",
    "w4a16-rotated",
    "w4a4-rotated",
    "w4a16-lorc",
    "int8-smooth",
    "fp8",
    "kv8",
    "kv8-fixed",
    "w4a8kv4",
]
RECIPES = ["w4a16", "w4a16-gptq", "kv4-centered", *(pytest.param(r, marks=pytest.mark.slow) for r in OTHER_RECIPES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "mistral"], ids=["tied", "untied"])
def test_quantized_on_load_saved_and_opened(name, recipe, dtype, tmp_path):
    model, quantized = on_load(name, recipe, tmp_path / "float", dtype)
    inputs = example(name)
    assert quantized.qcompile_report.recipe == recipe and quantized.dtype == dtype
    expected = output(quantized, inputs)
    qcompile.quantize(model, recipe, [inputs], progress=False)
    assert torch.equal(output(model, inputs), expected)
    again = reopened(quantized, tmp_path / "m")
    assert len(list((tmp_path / "m").glob("qcompile-*-of-*.safetensors"))) > 1
    assert torch.equal(output(again, inputs), expected)
    assert torch.equal(output(qcompile.load(tmp_path / "m"), inputs), expected)
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in quantized.state_dict().items()
    }
    again.tie_weights()  # as adapters and evaluators call it
    assert torch.equal(output(again, inputs), expected)
    with torch.no_grad():
        prompt = inputs["input_ids"][:, :4]
        tokens = [m.generate(prompt, max_new_tokens=4, do_sample=False) for m in (quantized, again)]
        assert torch.equal(*tokens)
        if "kv" in recipe:
            assert isinstance(again(prompt).past_key_values, KVCache)


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("mixtral", "w4a16"),
        ("qwen2_moe", "int8-rotated"),
        ("opt", "w4a16-rotated"),
        ("gpt2", "int8-rotated"),
        ("gemma3", "w4a16-rotated"),
        ("falcon", "int8-smooth"),
        ("bert", "int8"),
        ("vit", "w8a16"),
    ],
)
def test_other_models(name, recipe, tmp_path):
    """Stacks of experts, folded norms, weights stored as [K, N], no head."""
    _, quantized = on_load(name, recipe, tmp_path / "float")
    assert any(isinstance(m, QuantLinear | QuantStack) for m in quantized.modules())
    again = reopened(quantized, tmp_path / "m")
    assert torch.equal(output(again, example(name)), output(quantized, example(name)))


OTHER_RUNS = {"falcon_mamba", "jamba"}  # transformers computes otherwise after from_pretrained, of a float model too


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, tmp_path):
    """Of any class of transformers: ties of encoder and decoder, shared layers, state that a call leaves."""
    model, inputs = build(name), example(name)
    if not isinstance(model, tf.PreTrainedModel):
        pytest.skip("not a model of transformers")
    try:
        qcompile.quantize(model, "w8a16", [inputs], progress=False)
    except ValueError as error:
        pytest.skip(str(error)[:80])
    expected = output(model, inputs)
    found = output(reopened(model, tmp_path / "m", "50GB"), inputs)
    assert torch.allclose(found, expected, atol=1e-5) if name in OTHER_RUNS else torch.equal(found, expected)


def test_auto_classes_pipelines_and_names_of_recipes(tmp_path):
    _, quantized = on_load("llama", "w8a16", tmp_path / "float")
    quantized.save_pretrained(tmp_path / "m")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert isinstance(again.lm_head, QuantLinear) and again.is_quantized and again.hf_quantizer.is_trainable
    assert again.qcompile_recipe["name"] == "w8a16" and "transformers_weights" not in again.config.to_dict()
    as_data = {"quant_method": "qcompile", "recipe": "w8a16"}
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=as_data)
    assert torch.equal(output(plain, example("llama")), output(quantized, example("llama")))


def test_a_model_that_was_opened_is_saved_as_before(tmp_path):
    _, quantized = on_load("llama", "w4a8kv4", tmp_path / "float")
    again = reopened(quantized, tmp_path / "a", "50GB")
    copy.deepcopy(again).save_pretrained(tmp_path / "b")
    for name in ("config.json", "qcompile.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    metas = [json.loads((tmp_path / part / "qcompile.json").read_text()) for part in "ab"]
    assert metas[0] == metas[1]


def test_a_recipe_that_leaves_every_layer_float(tmp_path):
    _, folded = on_load("llama", Recipe("folded", (Untie(), FoldNorm())), tmp_path / "float")
    again = reopened(folded, tmp_path / "m")
    assert torch.equal(output(again, example("llama")), output(folded, example("llama")))
    assert again.qcompile_recipe["name"] == "folded"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_that_ran_runs_unless_another_is_chosen(implementation, tmp_path):
    _, quantized = on_load("llama", "w8a16", tmp_path / "float", attn_implementation=implementation)
    again = reopened(quantized, tmp_path / "m")
    assert again.config._attn_implementation == implementation
    chosen = type(again).from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert chosen.config._attn_implementation == "eager"


def test_quantizing_on_several_devices_is_refused(tmp_path):
    devices = {"model.embed_tokens": "cpu", "model.layers": "disk", "": "cpu"}
    with pytest.raises(RecipeError, match="on one device. Fix: device_map='cpu'"):
        on_load("llama", "w8a16", tmp_path / "float", device_map=devices)


class TestRefusals:
    def test_missing_data_is_named_as_by_quantize(self, tmp_path):
        build("llama").save_pretrained(tmp_path)
        with pytest.raises(RecipeError, match="Fix:"):
            tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=qcompile.QCompileConfig("w4a16-gptq"))

    def test_a_folder_of_another_method(self, tmp_path):
        build("llama").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        other = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": other}))
        with pytest.raises(ValueError, match="passing a QCompileConfig config"):
            tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=qcompile.QCompileConfig("int8"))
        with pytest.raises(CheckpointError, match="is quantized by 'fp8'. Fix: read it with transformers"):
            qcompile.load(tmp_path)

    def test_our_folder_by_another_method(self, tmp_path):
        _, quantized = on_load("llama", "w8a16", tmp_path / "float")
        quantized.save_pretrained(tmp_path / "m")
        with pytest.raises(ValueError, match="quantized with QCompileConfig but you are passing a BitsAndBytesConfig"):
            tf.LlamaForCausalLM.from_pretrained(tmp_path / "m", quantization_config=tf.BitsAndBytesConfig())

    def test_another_schema(self, tmp_path):
        _, quantized = on_load("llama", "w8a16", tmp_path / "float")
        quantized.save_pretrained(tmp_path / "m")
        config = json.loads((tmp_path / "m/config.json").read_text())
        config["quantization_config"] |= {"schema": 9, "qcompile": "7.1"}
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="has schema 9, written by qcompile 7.1"):
            tf.LlamaForCausalLM.from_pretrained(tmp_path / "m")

    def test_a_config_that_only_names_the_method(self, tmp_path):
        build("llama").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "qcompile", "recipe": "int8"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="describes no quantized model. Fix: write the folder by"):
            tf.LlamaForCausalLM.from_pretrained(tmp_path)

    def test_a_folder_of_schema_1(self, tmp_path):
        shutil.copytree(SCHEMA1 / "decoder", tmp_path / "m")
        config = json.loads((tmp_path / "m/config.json").read_text())
        config["quantization_config"] = {"quant_method": "qcompile"}
        config["transformers_weights"] = "none for transformers: read this folder with qcompile.load"
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="read this folder with qcompile.load"):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")

    def test_the_writer_of_the_class(self, tmp_path):
        _, quantized = on_load("llama", "w8a16", tmp_path / "float")
        with pytest.raises(CheckpointError, match="Fix: call it on the model"):
            tf.LlamaForCausalLM.save_pretrained(quantized, tmp_path / "m")
        assert not list((tmp_path / "m").glob("*.safetensors"))


def test_the_zoo_has_what_the_matrix_needs():
    assert build("llama").config.tie_word_embeddings and not build("mistral").config.tie_word_embeddings
    assert isinstance(build("mixtral"), nn.Module) and "mixtral" in ZOO
