"""What a folder is called and says: one that transformers reads as it is, and one that only qcompile reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from zoo import build, example

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_content import FolderContent
from qcompile.checkpoint.folder_meta import parse_meta, read_meta


def quantized(name):
    model = build(name)
    qcompile.quantize(model, "w8a16", example=example(name), progress=False)
    return model


@pytest.mark.parametrize(
    "model, plain, stem",
    [
        (lambda: build("llama"), True, "model"),
        (lambda: build("mlp"), True, "model"),
        (lambda: quantized("llama"), False, "qcompile"),
        (lambda: quantized("mlp"), False, "model"),
    ],
    ids=["float", "float module", "quantized", "quantized module"],
)
def test_names_and_formats_of_files(model, plain, stem, tmp_path):
    content = FolderContent.of(model())
    content.write(tmp_path)
    assert content.is_plain == plain and content.size > 0
    with safe_open(tmp_path / f"{stem}.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt" if plain else "qcompile"}
    assert read_meta(tmp_path).weights == f"{stem}.safetensors"
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_config_json_says_what_qcompile_json_says(tmp_path):
    FolderContent.of(quantized("llama"), "30KB").write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    told = parse_meta(config["quantization_config"], tmp_path / "config.json", tmp_path)
    meta = read_meta(tmp_path)
    assert told.weights == meta.weights == "qcompile.safetensors.index.json"
    assert (told.recipe, told.modules, told.tensors, told.computed) == (
        meta.recipe, meta.modules, meta.tensors, meta.computed
    )  # fmt: skip
    assert "config.json" in meta.files and not told.files and config["dtype"] == "float32"


def test_a_float_model_in_several_files_is_read_by_transformers(tmp_path):
    model, inputs = build("llama"), example("llama")
    qcompile.save(model, tmp_path / "m", max_shard_size="30KB")
    assert (tmp_path / "m/model.safetensors.index.json").is_file()
    for again in (type(model).from_pretrained(tmp_path / "m"), qcompile.load(tmp_path / "m")):
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_what_cannot_be_stored_is_refused_when_it_is_collected():
    with pytest.raises(CheckpointError, match="on the meta device"):
        FolderContent.of(nn.Linear(3, 3, device="meta"))
    with pytest.raises(CheckpointError, match="is no size"):
        FolderContent.of(nn.Linear(3, 3), 0)
