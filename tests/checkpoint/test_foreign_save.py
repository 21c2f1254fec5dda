"""A quantized model is not written by transformers, whose reader would fill it with random weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from zoo import build

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.passes import FoldNorm, Untie
from qcompile.recipe.recipe import Recipe


def test_save_pretrained_of_a_quantized_model_names_what_to_call(tmp_path):
    model = build("llama")
    qcompile.quantize(model, "int8", progress=False)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(CheckpointError, match=r"random weights.*Fix: qcompile.save"):
            each.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    qcompile.save(model, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="Fix: qcompile.save"):
        qcompile.load(tmp_path / "ours").save_pretrained(tmp_path / "theirs")


def test_save_pretrained_of_a_float_model_stays(tmp_path):
    """Where every layer is as transformers built it."""
    model = build("llama")
    qcompile.quantize(model, Recipe("folded", (Untie(), FoldNorm())), progress=False)
    model.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/model.safetensors").is_file()


class Convolutions(nn.Sequential):
    """As a model of transformers whose weights are all of convolutions."""

    def save_pretrained(self, folder):
        raise AssertionError("what it would write has no weight")


def test_a_settled_model_of_convolutions_is_not_written_either():
    model = Convolutions(*(layer for _ in range(3) for layer in (nn.Conv1d(4, 4, 3, padding=1), nn.ReLU())))
    x = torch.randn(2, 4, 9)
    qcompile.train(model, "int4-train", example=x, progress=False)
    model(x).sum().backward()
    qcompile.settle(model)
    with pytest.raises(CheckpointError, match="Fix: qcompile.save"):
        model.save_pretrained("nowhere")


def test_a_run_of_adapters_is_written_for_trainer_and_refused_by_from_pretrained(tmp_path):
    model = build("llama")
    qcompile.quantize(model, "w4a16-g32", progress=False)
    qcompile.qa_lora(model, rank=2)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(Exception, match="none for from_pretrained|qcompile"):
        type(model).from_pretrained(tmp_path / "run")
