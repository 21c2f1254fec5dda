"""Models by name: local folders and checkpoints; what is missing is named with its fix."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import tokenizers
import torch
import transformers as tf
from zoo import build, example

import qcompile
from qcompile.generation.pretrained import ModelNotFound, embedded, embedded_encoder, load_encoder, load_pretrained
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


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="embedded model is not installed. Fix:\n  pip install"):
        embedded()
    with pytest.raises(ModelNotFound, match="embedded encoder is not installed. Fix:\n  pip install"):
        embedded_encoder()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelNotFound, match="needs transformers. Fix: pip install"):
        load_pretrained("somewhere")
