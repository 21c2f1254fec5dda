"""A quantized model is not written by transformers, whose reader would fill it with random weights."""

from __future__ import annotations

import copy
import pickle

import pytest
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
