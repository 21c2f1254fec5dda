"""A model's own lists of tied weights say what is tied after some of them were replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.modules.tied_names import forget_broken_ties, named_ties


def tied(name="llama"):
    model = build(name)
    assert model.config.tie_word_embeddings and model.all_tied_weights_keys
    return model


@pytest.mark.parametrize("recipe", ["w4a16", "exact"])
def test_tie_weights_changes_nothing_after_quantizing_a_tied_head(recipe, tmp_path):
    model, inputs = tied(), example("llama")
    qcompile.quantize(model, recipe, progress=False)
    assert model.config.tie_word_embeddings is False and not model.all_tied_weights_keys
    with torch.no_grad():
        want = model(**inputs).logits
        model.tie_weights()
        assert torch.equal(model(**inputs).logits, want)
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.embed_tokens
    qcompile.save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(qcompile.load(tmp_path / "m")(**inputs).logits, want)


def test_ties_that_still_hold_stay():
    model = tied()
    before = dict(model.all_tied_weights_keys)
    forget_broken_ties(model, named_ties(model))
    assert model.all_tied_weights_keys == before and model.config.tie_word_embeddings


class Scaled(nn.Module):
    """A model in transformers' manner whose forward reads the flag."""

    _tied_weights_keys = {"head.weight": "table.weight"}

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight
        self.config = type("Config", (), {"tie_word_embeddings": True})()

    def get_expanded_tied_weights_keys(self, all_submodels):
        return self._tied_weights_keys if self.config.tie_word_embeddings else {}

    def forward(self, ids):
        h = self.table(ids)
        if self.config.tie_word_embeddings:
            h = h * 0.5
        return self.head(h)


def test_a_flag_that_the_forward_reads_stays():
    model, ids = Scaled(), torch.tensor([[1, 2]])
    ties, want = named_ties(model), model(ids)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    forget_broken_ties(model, ties)
    assert model._tied_weights_keys == {} and torch.equal(model(ids), want)
    assert Scaled._tied_weights_keys == {"head.weight": "table.weight"}
