"""Models by name: local folders and checkpoints; what is missing is named with its fix."""

from __future__ import annotations

import json
import sys

import pytest
import tokenizers
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from zoo import build, example

import qcompile
from qcompile.generation.pretrained import ModelNotFound, load_encoder, load_pretrained
from qcompile.modules.quant_linear import QuantLinear


@pytest.fixture
def tokenizer():
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="?")


def test_a_folder_gives_the_model_for_inference_and_its_tokenizer(tokenizer, tmp_path):
    model = build("llama")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    loaded, read = load_pretrained(str(tmp_path))
    inputs = example("llama")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert read.convert_tokens_to_ids(["b", "zebra"]) == [1, 2]
    assert load_pretrained(str(tmp_path), torch.bfloat16)[0].dtype == torch.bfloat16
    assert type(load_encoder(str(tmp_path))[0]).__name__ == "LlamaModel"


def test_a_checkpoint_is_loaded_with_its_codes(tokenizer, tmp_path):
    model, inputs = build("llama"), example("llama")
    qcompile.quantize(model, "int8", [inputs], progress=False)
    qcompile.save(model, tmp_path / "m", tokenizer)
    loaded, _ = load_pretrained(str(tmp_path / "m"))
    assert any(isinstance(module, QuantLinear) for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ModelNotFound, match="no file .*x.gguf. Fix: check the path"):
        load_pretrained(str(tmp_path / "x.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="empty could not be loaded: .* Fix: give a local folder"):
        load_pretrained(str(tmp_path / "empty"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelNotFound, match="needs transformers. Fix: pip install"):
        load_pretrained("somewhere")


# -- files and configurations that do not fit each other ---------------------------------------------


@pytest.fixture
def folder(tokenizer, tmp_path):
    for part in (build("mistral"), tokenizer):
        part.save_pretrained(tmp_path / "f")
    return tmp_path / "f"


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), r"missing \['model.layers.0.mlp.up_proj.weight'\] \(1 in all\)"),
        (lambda t: t.update({UP: t[UP][:5].clone()}), r"of another shape \['model.layers.0.mlp.up_proj.weight'\]"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), r"unknown \['model.extra'\]"),
        (lambda t: t.pop("lm_head.weight"), r"missing \['lm_head.weight'\]"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_named(change, words, folder):
    change_tensors(folder, change)
    with pytest.raises(ModelNotFound, match=f"does not hold the tensors of its model: {words}") as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"architectures": ["NoSuch"]}, {"architectures": ["BertLMHeadModel"]}, {"architectures": ["AutoConfig"]},
     {"hidden_size": "x"}, {"hidden_size": -64}, {"hidden_size": 10**12}, {"num_hidden_layers": 10**9},
     {"vocab_size": 10**15}, {"model_type": "nothing"}, {"model_type": None}, {"num_attention_heads": 0},
     {"rope_parameters": 3}, {"hidden_act": "none"}],
)  # fmt: skip
def test_a_damaged_configuration_ends_in_one_line(change, folder):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(ModelNotFound, match="Fix: |does not have|is damaged") as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


def test_the_class_is_the_one_of_the_configuration(tokenizer, tmp_path):
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(config).eval().requires_grad_(False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "c")
    with pytest.raises(ModelNotFound, match="is a BertForSequenceClassification, and no causal LM"):
        load_pretrained(str(tmp_path / "c"))
    loaded, _ = load_pretrained(str(tmp_path / "c"), any_class=True)
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert type(loaded) is type(model) and torch.allclose(loaded(**ids).logits, model(**ids).logits)
    assert type(load_encoder(str(tmp_path / "c"))[0]).__name__ == "BertModel"  # without its head, which is no fault
    qcompile.quantize(loaded, "w8a16", [ids], progress=False)
    qcompile.save(loaded, tmp_path / "q", tokenizer)
    again, _ = load_pretrained(str(tmp_path / "q"), any_class=True)
    assert type(again) is type(model) and torch.equal(again(**ids).logits, loaded(**ids).logits)
    for read in (load_pretrained, load_encoder):
        with pytest.raises(ModelNotFound, match="no causal LM|is quantized already"):
            read(str(tmp_path / "q"))


def test_an_encoder_without_a_pooler_gets_none(tokenizer, tmp_path):
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = tf.BertModel(config, add_pooling_layer=False).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "c")
    loaded, _ = load_encoder(str(tmp_path / "c"))
    assert loaded.pooler is None


def test_folders_of_ours_that_are_not_whole(tokenizer, tmp_path):
    model = build("llama")
    qcompile.quantize(model, "w8a16", [example("llama")], progress=False)
    qcompile.save(model, tmp_path / "m")
    with pytest.raises(ModelNotFound, match="the tokenizer of .* could not be loaded"):
        load_pretrained(str(tmp_path / "m"))
    (tmp_path / "m/qcompile.safetensors").rename(tmp_path / "m/other")
    with pytest.raises(ValueError, match="qcompile.safetensors cannot be read"):
        load_pretrained(str(tmp_path / "m"))
    (tmp_path / "m/qcompile.json").unlink()
    with pytest.raises(ModelNotFound, match="its qcompile.json is missing"):
        load_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize("size", [0, 3, 30, 3000])
def test_a_cut_gguf_file_ends_in_one_line(size, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03" + bytes(size))
    with pytest.raises(ModelNotFound, match="x.gguf"):
        load_pretrained(str(tmp_path / "x.gguf"))
