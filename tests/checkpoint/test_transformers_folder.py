"""Files of transformers in a checkpoint: other loaders refuse them, and ours builds the class that was saved."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from zoo import build, example

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_meta import FolderMeta
from qcompile.checkpoint.transformers_folder import build_model, describe_folder, implementations, write_files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "m"
    model = build("llama")
    qcompile.quantize(model, "w8a16", [example("llama")], progress=False)
    qcompile.save(model, folder)
    return folder


@pytest.mark.parametrize("cls", [tf.AutoModelForCausalLM, tf.LlamaForCausalLM])
def test_a_class_of_transformers_reads_the_folder_of_a_quantized_model(cls, saved):
    """Once qcompile is imported; tests/transformers_plugin/test_registration.py has the rest."""
    with torch.no_grad():
        expected = qcompile.load(saved)(**example("llama")).logits
        assert torch.equal(cls.from_pretrained(saved)(**example("llama")).logits, expected)
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qcompile"
    assert "read this folder with qcompile.load" in config["transformers_weights"]


def test_the_marks_are_in_the_file_only(saved, tmp_path):
    model = qcompile.load(saved)
    assert not {"quantization_config", "transformers_weights"} & set(model.config.to_dict())
    qcompile.save(model, tmp_path / "again")
    for name in ("config.json", "qcompile.json", "qcompile.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_transformers_reads_the_folder_of_a_float_model(tmp_path):
    model, inputs = build("llama"), example("llama")
    qcompile.save(model, tmp_path / "m")
    assert torch.equal(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")(**inputs).logits, model(**inputs).logits)


def test_implementations_are_those_that_ran(tmp_path):
    model = build("llama")
    model.set_attn_implementation("eager")
    meta = FolderMeta(None, "LlamaForCausalLM", {}, {}, implementations=implementations(model))
    write_files(model, None, tmp_path, mark=True)
    state = torch.get_rng_state()
    assert build_model(tmp_path, meta).config._attn_implementation == "eager"
    assert torch.equal(torch.get_rng_state(), state)  # random weights come from another generator


def test_a_changed_configuration_is_refused(saved, tmp_path):
    model = build("llama")
    files = write_files(model, None, tmp_path, mark=True)
    meta = FolderMeta(None, "LlamaForCausalLM", {}, {}, files=files)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match="config.json was changed"):
        build_model(tmp_path, meta)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "64"}, {"hidden_size": 10**15}, {"model_type": "x"}, {"model_type": 3}]
)
def test_a_configuration_that_builds_nothing_ends_in_one_line(change, tmp_path):
    write_files(build("llama"), None, tmp_path, mark=True)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM cannot be built from .*config.json") as caught:
        build_model(tmp_path, FolderMeta(None, "LlamaForCausalLM", {}, {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["NoSuchClass", "AutoConfig", "__doc__", "AutoModel"])
def test_only_classes_of_models_are_built(name, tmp_path):
    write_files(build("llama"), None, tmp_path, mark=True)
    with pytest.raises(CheckpointError, match=f"transformers has no class {name}"):
        build_model(tmp_path, FolderMeta(None, name, {}, {}))


def test_other_folders_are_named_for_what_they_are(tmp_path):
    assert "does not exist" in describe_folder(tmp_path / "x")
    assert "is empty" in describe_folder(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in describe_folder(tmp_path / "file")
    assert "holds no qcompile.json. Fix: name a folder" in describe_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "folder of transformers. Fix: read it with qcompile.load_pretrained" in describe_folder(tmp_path)
    (tmp_path / "model.onnx").write_text("")
    assert "exported ONNX folder" in describe_folder(tmp_path)
