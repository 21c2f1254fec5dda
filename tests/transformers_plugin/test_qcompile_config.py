"""QCompileConfig: bad arguments are refused before a model is loaded, data is never written, folders are checked."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.folder_meta import FolderMeta
from qcompile.pipeline.presets import PRESETS
from qcompile.recipe.rule import RecipeError

STORED = FolderMeta(PRESETS["int8"].to_json(), "LlamaForCausalLM", {}, {}, tensors={}, weights="qcompile.safetensors")


def test_it_is_a_name_of_the_package():
    assert qcompile.QCompileConfig is qcompile.QCompileConfig and "QCompileConfig" in qcompile.__all__


@pytest.mark.parametrize("recipe, words", [("int9", "unknown recipe 'int9'"), ("int4-train", "trains. Fix: load")])
def test_a_bad_recipe_is_refused_at_once(recipe, words):
    with pytest.raises(RecipeError, match=words):
        qcompile.QCompileConfig(recipe)


def test_data_is_shared_by_copies_and_in_no_file():
    config = qcompile.QCompileConfig("w4a16-gptq", (torch.ones(1, 2) for _ in range(1)))  # cannot be copied
    other = copy.deepcopy(config)
    assert other is not config and other.calibration is config.calibration
    assert json.loads(config.to_json_string()) == dict(config) == {"quant_method": "qcompile", "recipe": "w4a16-gptq"}
    recipe = qcompile.QCompileConfig(PRESETS["int8"]).to_dict()["recipe"]
    assert recipe == PRESETS["int8"].to_json()


def test_plain_data_gives_the_same():
    config = qcompile.QCompileConfig.from_dict({"quant_method": "qcompile", "recipe": "w8a16", "verify": False})
    assert config.recipe == "w8a16" and not config.calibration.verify and config.stored is None
    with pytest.raises(CheckpointError, match="has no 'bits'. Fix: remove it"):
        qcompile.QCompileConfig.from_dict({"recipe": "w8a16", "bits": 8})


def test_what_a_folder_says_is_read():
    data = {"quant_method": "qcompile", **STORED.to_json()}
    config, unused = qcompile.QCompileConfig.from_dict(data, return_unused_kwargs=True, other=1)
    assert config.stored == STORED and config.recipe == STORED.recipe and unused == {"other": 1}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quant_method": "gptq"}, "quantization_config of 'gptq', not of qcompile"),
        ({"schema": 9, "qcompile": "7.1"}, "has schema 9, written by qcompile 7.1.*Fix: install"),
        ({"class": "Other"}, "config.json was changed"),
        ({"modules": 3}, "modules is of a wrong type"),
        ({"weights": "../../weights.safetensors"}, "weights is of a wrong type"),
    ],
)
def test_what_is_none_of_ours_is_refused(change, words):
    with pytest.raises(CheckpointError, match=words):
        qcompile.QCompileConfig.from_dict({"quant_method": "qcompile", **STORED.to_json(), **change})
