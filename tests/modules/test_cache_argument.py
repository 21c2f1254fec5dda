"""The cache of a call and of a result, under the names that versions of transformers give it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny_text_models import one_layer_llama
from torch import nn
from transformers import DynamicCache, modeling_outputs

from qcompile.generation.growing_cache import as_growing
from qcompile.modules import cache_argument as cache_argument_module
from qcompile.modules.cache_argument import (
    NAMES,
    cache_argument,
    cache_name,
    given_cache,
    returned_cache,
    with_cache,
)


class Named(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return input_ids


class Renamed(nn.Module):
    def forward(self, input_ids, cache=None):
        return input_ids


class Open(nn.Module):
    def forward(self, input_ids, **kwargs):
        return input_ids


@pytest.mark.parametrize(
    "model, name",
    [(Named(), "past_key_values"), (Renamed(), "cache"), (Open(), None), (torch.compile(Named()), "past_key_values")],
)
def test_the_name_is_that_of_the_forward(model, name):
    assert cache_argument(model) == name
    given = with_cache(model, {"input_ids": 1, "cache": 2}, 3)
    assert given == {"input_ids": 1, name or cache_name(): 3}
    assert with_cache(model, {"past_key_values": 2}, None) == {name or cache_name(): None}


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_found_under_either_name(name):
    assert given_cache({"input_ids": 1, name: 2}) == 2 and given_cache({"input_ids": 1, name: None}) is None
    assert returned_cache(SimpleNamespace(logits=1, **{name: 2})) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_library_is_that_of_its_results(name, monkeypatch):
    """Of a version that is not installed too."""
    result = dataclasses.make_dataclass("CausalLMOutputWithPast", ["logits", name])
    monkeypatch.setattr(modeling_outputs, "CausalLMOutputWithPast", result)
    assert cache_name.__wrapped__() == name
    monkeypatch.setattr(cache_argument_module, "cache_name", lambda: name)
    assert with_cache(Open(), {"input_ids": 1}, 3) == {"input_ids": 1, name: 3}


def test_a_result_without_a_cache_has_none():
    assert returned_cache((1, 2)) is None and returned_cache(SimpleNamespace(logits=1)) is None


def test_models_of_the_installed_transformers_take_and_return_it():
    model, ids = one_layer_llama(90), torch.arange(5)[None]
    cache = DynamicCache()
    with torch.no_grad():
        first = model(**with_cache(model, {"input_ids": ids[:, :4], "use_cache": True}, cache))
        assert returned_cache(first) is cache and cache.get_seq_length() == 4
        as_growing(cache)
        last = model(**with_cache(model, {"input_ids": ids[:, 4:], "use_cache": True}, cache))
    assert torch.allclose(last.logits[0, 0], model(input_ids=ids).logits[0, 4], atol=1e-5)
