"""The modules that fill a cache, by what runs when it is filled."""

from __future__ import annotations

import pytest
from zoo import build

import qcompile
from qcompile.api.served_attentions import attention_paths

PATHS = {
    "llama": "model.layers.{}.self_attn", "gpt2": "transformer.h.{}.attn", "opt": "model.decoder.layers.{}.self_attn",
    "gpt_neox": "gpt_neox.layers.{}.attention",
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_each_layer_is_filled_by_its_attention(name):
    model = build(name)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert attention_paths(model) == [PATHS[name].format(layer) for layer in range(2)]
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_cache_of_ours_is_not_in_the_way():
    model = build("llama")
    qcompile.quantize(model, "kv8", progress=False)
    assert attention_paths(model) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
