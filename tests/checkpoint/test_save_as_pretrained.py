"""save_pretrained of a quantized model writes a folder of ours, whoever calls it; of a float model it stays theirs."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from zoo import build, example

import qcompile
from qcompile.checkpoint import tensor_file
from qcompile.checkpoint.atomic_folder import CheckpointError, WriteError
from qcompile.modules.quant_linear import QuantLinear
from qcompile.passes import FoldNorm, Untie
from qcompile.recipe.recipe import Recipe


def quantized(recipe="w8a16", name="llama"):
    model = build(name)
    qcompile.quantize(model, recipe, example=example(name), progress=False)
    return model


def output(model):
    with torch.no_grad():
        return model(**example("llama")).logits


def test_it_writes_what_save_writes(tmp_path):
    model = quantized()
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    qcompile.save(model, tmp_path / "save")
    for index, each in enumerate([*copies, qcompile.load(tmp_path / "save")]):
        each.save_pretrained(tmp_path / str(index))
        assert sorted(os.listdir(tmp_path / str(index))) == sorted(os.listdir(tmp_path / "save"))
        for name in os.listdir(tmp_path / "save"):
            written = (tmp_path / str(index) / name).read_bytes()
            assert written == (tmp_path / "save" / name).read_bytes(), name


def test_a_copy_is_what_its_own_method_writes(tmp_path):
    """The method is bound to the copy, not to the model that was copied."""
    model = quantized()
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data.zero_()
    other.save_pretrained(tmp_path)
    assert not qcompile.load(tmp_path).model.embed_tokens.weight.any()


def test_shards_of_a_size(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    files = sorted((tmp_path / "m").glob("qcompile-*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert len(files) > 2 and all(
        size <= 30_000 or len(load_file(f)) == 1 for size, f in zip(sizes, files, strict=True)
    )
    assert torch.equal(output(qcompile.load(tmp_path / "m")), output(model))
    with pytest.raises(CheckpointError, match="max_shard_size='big' is no size"):
        model.save_pretrained(tmp_path / "n", max_shard_size="big")
    assert not (tmp_path / "n").exists()


def test_into_a_folder_that_exists(tmp_path):
    """As Trainer and users do; weights of an earlier save that are not written again are gone."""
    model = quantized()
    (tmp_path / "mine").write_text("stays")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*qcompile*")) == ["qcompile.json", "qcompile.safetensors"]
    assert (tmp_path / "mine").read_text() == "stays" and not list(tmp_path.glob(".*"))
    assert torch.equal(output(qcompile.load(tmp_path)), output(model))


def test_over_the_float_model(tmp_path):
    """Its file stays and is no longer read: by neither reader."""
    float_model, model = build("llama"), quantized()
    float_model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for again in (qcompile.load(tmp_path), tf.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(again.lm_head, QuantLinear) and torch.equal(output(again), output(model))


def test_an_error_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model = quantized()
    model.save_pretrained(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    written = []
    real = tensor_file.write_shard

    def full_disk(tensors, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(tensor_file, "write_shard", full_disk)
    with pytest.raises(WriteError, match="No space left on device.*Fix: free some space"):
        model.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_other_ranks_write_nothing(tmp_path):
    quantized().save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "argument", [{"state_dict": {}}, {"variant": "fp16"}, {"distributed_checkpoint": True}], ids=lambda a: next(iter(a))
)
def test_what_asks_for_another_format_is_refused(argument, tmp_path):
    with pytest.raises(CheckpointError, match=f"Fix: save_pretrained without {next(iter(argument))}"):
        quantized().save_pretrained(tmp_path / "m", **argument)
    assert not (tmp_path / "m").exists()


def test_a_hub_gets_the_files(tmp_path, monkeypatch):
    """transformers' own upload, whose files are ours."""
    uploads = []
    module = tf.utils.hub

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **kwargs):
            uploads.append((repo_id, {o.path_in_repo for o in operations}, kwargs["commit_message"]))

    class Card:
        def save(self, path):
            (tmp_path / "card").write_text(str(path))

    monkeypatch.setattr(module, "hf_api", lambda: Api())
    monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    model = quantized()
    model.push_to_hub("me/small", max_shard_size="30KB")
    model.save_pretrained(tmp_path / "named", push_to_hub=True, commit_message="codes")
    model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="me/other")
    assert [(repo, message) for repo, _, message in uploads] == [
        ("me/small", "Upload LlamaForCausalLM"), ("named", "codes"), ("me/other", "Upload LlamaForCausalLM")
    ]  # fmt: skip
    assert "qcompile.safetensors.index.json" in uploads[0][1]
    assert {"config.json", "qcompile.json", "qcompile.safetensors"} <= uploads[1][1]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapters_are_written_as_transformers_writes_them(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    # transformers 5.24 takes adapters of peft 0.22 and later, which is in no index yet; 0.21 has what this needs.
    monkeypatch.setattr(tf.integrations.peft, "MIN_PEFT_VERSION", "0.21.0")
    model = quantized("w4a16")
    model.add_adapter(peft.LoraConfig(target_modules=["embed_tokens"], r=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "qcompile.json").exists()


def test_save_pretrained_of_a_float_model_stays(tmp_path):
    """Where every layer is as transformers built it."""
    model = build("llama")
    qcompile.quantize(model, Recipe("folded", (Untie(), FoldNorm())), progress=False)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/model.safetensors").is_file()


def test_a_quantized_cache_alone_is_saved_too(tmp_path):
    model = quantized("kv8")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "qcompile.json").read_text())["recipe"]["name"] == "kv8"
    assert torch.equal(output(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), output(model))


class Convolutions(nn.Sequential):
    """As a model of transformers whose weights are all of convolutions."""

    def save_pretrained(self, folder):
        raise AssertionError("what it would write has no weight")


def test_a_settled_model_of_convolutions_is_ours_too(tmp_path):
    def made():
        torch.manual_seed(0)
        return Convolutions(*(layer for _ in range(3) for layer in (nn.Conv1d(4, 4, 3, padding=1), nn.ReLU())))

    model, x = made(), torch.randn(2, 4, 9)
    qcompile.train(model, "int4-train", example=x, progress=False)
    model(x).sum().backward()
    qcompile.settle(model)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(qcompile.load(tmp_path / "m", made())(x), model(x))


def test_a_run_of_adapters_is_written_for_trainer_and_refused_by_from_pretrained(tmp_path):
    model = quantized("w4a16-g32")
    qcompile.qa_lora(model, rank=2)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="none for from_pretrained: a run in training"):
        type(model).from_pretrained(tmp_path / "run")
