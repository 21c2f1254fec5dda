"""What transformers fills is what was saved: on any device map, in another dtype, and not from damaged files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from zoo import build, example

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tied model with a quantized cache and one with stacks of experts: folder and output of each."""
    root, found = tmp_path_factory.mktemp("places"), {}
    for name, recipe in (("llama", "w4a8kv4"), ("mixtral", "w4a16"), ("gemma2", "kv8")):
        model = build(name)
        qcompile.quantize(model, recipe, [example(name)], progress=False)
        model.save_pretrained(root / name, max_shard_size="60KB")
        found[name] = root / name, output(model, example(name))
    return found


MAPS = {
    "auto": "auto",
    "cpu": {"": "cpu"},
    "a layer on disk": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.filterwarnings("ignore:.*offload:UserWarning")
@pytest.mark.parametrize("devices", MAPS)
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_device_maps(name, buffers, devices, saved, tmp_path):
    folder, expected = saved[name]
    model = tf.AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS[devices], offload_folder=tmp_path, offload_buffers=buffers
    )
    assert torch.equal(output(model, example(name)), expected)
    kinds = [m for m in model.model.layers[1].modules() if isinstance(m, QuantLinear | QuantStack)]
    assert kinds and all(m.codes.is_meta == (buffers and devices == "a layer on disk") for m in kinds)
    if buffers and devices == "a layer on disk":
        with pytest.raises(CheckpointError, match="on the meta device: offloaded.*Fix: save a model whose tensors"):
            model.save_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_another_dtype_leaves_codes_and_scales(name, saved):
    folder, _ = saved[name]
    model = type(build(name)).from_pretrained(folder, dtype=torch.bfloat16)
    cast = qcompile.load(folder).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    expected = cast.state_dict()
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
    assert torch.isfinite(output(model, example(name))).all()


def test_ties_that_are_left_are_ties(saved):
    folder, expected = saved["gemma2"]
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert torch.equal(output(model, example("gemma2")), expected)


def test_buffers_of_a_model_that_was_cast(tmp_path):
    """transformers computes tables of positions in float32; those that ran were rounded."""
    model, inputs = build("llama").to(torch.bfloat16), example("llama")
    qcompile.quantize(model, "w8a16", [inputs], progress=False)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert torch.equal(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("cls", [tf.AutoModel, tf.LlamaModel, tf.LlamaForSequenceClassification])
def test_another_class_is_refused(cls, saved):
    with pytest.raises(CheckpointError, match="holds a LlamaForCausalLM, and is opened as Llama.*Fix: transformers"):
        cls.from_pretrained(saved["llama"][0])


def damaged(folder, target, change):
    """A copy of a folder with one tensor changed."""
    shutil.copytree(folder, target)
    file = sorted(target.glob("*.safetensors"))[0]
    tensors = load_file(file)
    save_file(change(tensors), file, {"format": "qcompile"})
    return target


CHANGES = {
    "one code": lambda t: {**t, "lm_head.codes": t["lm_head.codes"] ^ 1},
    "a tensor less": lambda t: {n: v for n, v in t.items() if n != "lm_head.codes"},
    "a tensor more": lambda t: {**t, "lm_head.other": torch.ones(3)},
    "another shape": lambda t: {**t, "lm_head.codes": t["lm_head.codes"][:-1].contiguous()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_tensors_are_refused(change, tmp_path):
    model = build("llama")
    qcompile.quantize(model, "w8a16", example=example("llama"), progress=False)
    model.save_pretrained(tmp_path / "m")
    folder = damaged(tmp_path / "m", tmp_path / "d", CHANGES[change])
    with pytest.raises(CheckpointError, match="Fix:"):
        tf.AutoModelForCausalLM.from_pretrained(folder)


def test_codes_of_another_layer_count_as_damage(saved, tmp_path):
    """Legal values of the right shape: only the digest knows."""
    folder, _ = saved["mixtral"]
    shutil.copytree(folder, tmp_path / "m")
    index = json.loads((tmp_path / "m/qcompile.safetensors.index.json").read_text())["weight_map"]
    name = next(key for key in index if key.endswith("o_proj.codes"))
    tensors = load_file(tmp_path / "m" / index[name])
    save_file({**tensors, name: tensors[name].flip(0).contiguous()}, tmp_path / "m" / index[name])
    with pytest.raises(CheckpointError, match="is damaged: .*o_proj.codes.*are not what was written"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_missing_shard_is_named(saved, tmp_path):
    shutil.copytree(saved["llama"][0], tmp_path / "m")
    sorted((tmp_path / "m").glob("*.safetensors"))[1].unlink()
    with pytest.raises((CheckpointError, OSError), match="qcompile-00002-of-"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
