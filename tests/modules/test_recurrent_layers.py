"""Hybrid caches, layer by layer."""

from __future__ import annotations

import torch
from zoo import build

from qcompile.modules.recurrent_layers import recurrent_layers


def layers_of(name):
    with torch.no_grad():
        return build(name)(input_ids=torch.arange(2, 6)[None], use_cache=True).past_key_values.layers


def test_convolutions_are_told_from_attentions():
    assert recurrent_layers(layers_of("lfm2")) == {0: "LinearAttentionLayer"}
    assert recurrent_layers(layers_of("llama")) == {}
