"""A cache that grows in place holds what transformers' own would, whatever is done to it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticCache
from transformers.models.llama import LlamaConfig

from qcompile.generation.growing_cache import (
    ROOM,
    GrowingLayer,
    as_dynamic,
    as_growing,
    obstacle_to_growing,
)


def states(tokens, batch=2):
    return torch.randn(batch, 3, tokens, 8), torch.randn(batch, 3, tokens, 8)


def both(first=5):
    plain, start = DynamicLayer(), states(first)
    plain.update(*start)
    return plain, GrowingLayer.of(plain)


def same(plain, grown):
    assert grown.get_seq_length() == plain.get_seq_length()
    assert torch.equal(grown.keys, plain.keys) and torch.equal(grown.values, plain.values)


@pytest.mark.parametrize("tokens", [1, 3, ROOM, 3 * ROOM])
def test_tokens_are_written_behind_the_others(tokens):
    plain, grown = both()
    for _ in range(3):
        new = states(tokens)
        want, got = plain.update(*new), grown.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    same(plain, grown)


def test_nothing_is_copied_while_there_is_room():
    _, grown = both()
    before = grown.keys.data_ptr()
    for _ in range(ROOM):
        grown.update(*states(1))
    assert grown.keys.data_ptr() == before
    grown.update(*states(1))
    assert grown.keys.data_ptr() != before


def test_a_layer_may_begin_empty():
    grown, plain, new = GrowingLayer(), DynamicLayer(), states(4)
    assert grown.get_seq_length() == 0 and grown.keys is None
    grown.update(*new), plain.update(*new)
    same(plain, grown)
    assert GrowingLayer.of(DynamicLayer()).get_seq_length() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
    ],
)
def test_what_generate_does_to_a_cache(change):
    plain, grown = both()
    for layer in (plain, grown):
        change(layer)
    same(plain, grown)
    new = states(2, plain.keys.shape[0])
    plain.update(*new), grown.update(*new)
    same(plain, grown)


def test_a_crop_moves_nothing_and_copies_are_apart():
    plain, grown = both()
    kept, before = copy.deepcopy(grown), grown.keys.data_ptr()
    grown.crop(-2)
    assert grown.keys.data_ptr() == before
    grown.update(*states(4))
    same(plain, kept)


def test_reset():
    _, grown = both()
    grown.reset()
    assert grown.get_seq_length() == 0
    new, plain = states(2), DynamicLayer()
    grown.update(*new), plain.update(*new)
    same(plain, grown)


def test_room_for_tokens_that_a_kernel_writes():
    plain, grown = both()
    new = states(1)
    keys, values = grown.reserve(1)
    keys[:, :, 5:6], values[:, :, 5:6] = new
    grown.advance(1)
    plain.update(*new)
    same(plain, grown)


def test_caches_change_their_layers_and_back():
    config = LlamaConfig(num_hidden_layers=2)
    cache = DynamicCache(config=config)
    assert obstacle_to_growing(cache) is None
    cache.update(*states(3), 0), cache.update(*states(3), 1)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for change, kind in ((as_growing, GrowingLayer), (as_dynamic, DynamicLayer), (as_growing, GrowingLayer)):
        change(cache)
        assert all(type(layer) is kind for layer in cache.layers) and cache.get_seq_length() == 3
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    before = cache.layers[0]
    as_growing(cache)
    assert cache.layers[0] is before


def test_windows_become_whole_and_other_layers_stand_in_the_way():
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    assert obstacle_to_growing(cache) is None
    as_dynamic(cache)
    cache.update(*states(9), 0)
    assert cache.get_seq_length() == 9 and cache.layers[0].keys.shape[2] == 9
    static = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=8)
    assert "StaticLayer" in obstacle_to_growing(static)
