"""Calls of a quantized model get the cache of its recipe, after loading too."""

from __future__ import annotations

import pytest
import torch
from zoo import build

import qcompile
from qcompile.modules.generation_hooks import attach
from qcompile.modules.kv_cache import KVCache
from qcompile.modules.kv_constants import CENTERS, SCALES, Centers, Scales
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe


def test_generate_uses_the_cache_and_a_checkpoint_keeps_it(tmp_path):
    model = build("llama")
    qcompile.quantize(model, Recipe("kv", (QuantizeKV(8), Quantize(), Fuse())), progress=False)
    ids = torch.randint(3, 128, (1, 6))
    done = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(done.past_key_values, KVCache) and done.past_key_values.get_seq_length() == 10
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m").generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(again.past_key_values, KVCache) and torch.equal(again.sequences, done.sequences)
    mine = KVCache(4)
    model.generate(ids, max_new_tokens=2, do_sample=False, past_key_values=mine)
    assert mine.get_seq_length() == 7, "the caller's own cache must be used"


@pytest.mark.parametrize(
    "name, constants", [(CENTERS, Centers([torch.ones(2, 16)])), (SCALES, Scales([(torch.ones(2, 16),) * 2]))]
)
def test_what_the_cache_needs_is_where_the_model_is(name, constants):
    model = build("llama").to("meta")
    attach(model, Recipe("kv", (QuantizeKV(8),)), constants=constants)
    assert {buffer.device.type for buffer in model.get_submodule(name).buffers()} == {"meta"}
