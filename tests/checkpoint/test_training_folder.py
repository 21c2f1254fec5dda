"""save_pretrained of a model in training: what Trainer resumes from, and from_pretrained refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from q_galore_models import equal_states, low_rank_linears, net, prepared
from safetensors.torch import load_file

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.training_folder import mark_training_folders
from qcompile.passes import QGaLore

RECIPE = qcompile.Recipe("test", (QGaLore(rank=4, gap=3),))


def decoder(seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=32, max_position_embeddings=32)
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False, attention_dropout=0.0
    )
    return transformers.LlamaForCausalLM(config)


def in_training(seed=0):
    model = decoder(seed)
    qcompile.train(model, RECIPE, progress=False)
    return model.train()


@pytest.mark.parametrize("copied", [False, True])
def test_what_it_writes_is_the_state_and_no_model_for_from_pretrained(tmp_path, copied):
    model = copy.deepcopy(in_training()) if copied else in_training()
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    model.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="none for from_pretrained: a run in training"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    other = in_training(seed=1)
    missing = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys and equal_states(model, other)


def test_a_settled_model_and_the_config_are_free_of_marks(tmp_path):
    model = in_training()
    model.save_pretrained(tmp_path / "a")
    assert not hasattr(model.config, "transformers_weights")
    assert "transformers_weights" in json.loads((tmp_path / "a" / "config.json").read_text())
    qcompile.settle(model)
    model.save_pretrained(tmp_path / "b")
    qcompile.save(model, tmp_path / "c")
    ids = torch.arange(8)[None]
    for folder in "bc":
        assert torch.equal(qcompile.load(tmp_path / folder)(ids).logits, model(ids).logits)


def test_settled_to_float_it_is_a_model_of_transformers_again(tmp_path):
    model = decoder()
    qcompile.train(model, qcompile.Recipe("galore", (QGaLore(rank=4, weight=None),)), progress=False)
    qcompile.settle(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_other_ranks_write_nothing(tmp_path):
    in_training().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()


def test_a_hub_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"qcompile.settle\(model\)"):
        in_training().save_pretrained(tmp_path, push_to_hub=True)


def test_saving_is_refused_until_it_is_settled(tmp_path):
    with pytest.raises(CheckpointError, match="qcompile.settle"):
        qcompile.save(in_training(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_models_without_save_pretrained_or_training():
    model = prepared(net())
    mark_training_folders(model)
    assert low_rank_linears(model) and not hasattr(model, "save_pretrained")
    plain = decoder()
    mark_training_folders(plain)
    assert "save_pretrained" not in vars(plain)
