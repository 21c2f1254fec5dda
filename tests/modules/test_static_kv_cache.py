"""A quantized cache in static buffers: what the growing one holds, in one graph for all lengths."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

from qcompile.modules.kv_cache import KVCache
from qcompile.modules.static_kv_cache import StaticKVCache, StaticQuantizedLayer
from qcompile.recipe.certificate import relative_error

DECODERS = ["llama", "qwen3", "phi3", "gemma3", "gpt_neox"]


def steps(model, cache, ids):
    """Logits of a prompt and of single tokens behind it."""
    with torch.no_grad():
        found = [model(ids[:, :9], past_key_values=cache).logits]
        found += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(9, ids.shape[1])]
    return torch.cat(found, 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DECODERS)
def test_a_model_computes_what_it_computes_with_the_growing_cache(name, bits):
    model, ids = build(name), torch.randint(3, 128, (2, 14))
    cache = StaticKVCache(model.config.num_hidden_layers, 100, bits)
    got, want = steps(model, cache, ids), steps(model, KVCache(bits), ids)
    assert relative_error(got, want) < 1e-5 and [int(layer.get_seq_length()) for layer in cache.layers] == [14, 14]


def test_generate():
    model, ids = build("llama"), example("llama")["input_ids"][:, :8]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded at the left
    settings = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    got = model.generate(ids, past_key_values=StaticKVCache(2, 32), **settings)
    assert torch.equal(got, model.generate(ids, past_key_values=KVCache(4), **settings))


def test_buffers_stay_where_they_are():
    layer, states = StaticQuantizedLayer(100, 4), torch.randn(2, 3, 5, 32)
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(1) == (128, 0) and layer.get_max_length() == 128
    layer.update(states, states)
    places = [buffer.data_ptr() for buffer in (*layer.buffers, layer.cumulative_length)]
    first = layer.update(states, states)[0][:, :, :10].clone()
    layer.crop(-5)
    with pytest.raises(ValueError, match="-n drops the last n"):
        layer.crop(5)
    assert int(layer.get_seq_length()) == 5
    again = layer.update(states, states)[0][:, :, :10]
    assert torch.equal(first, again)
    layer.reorder_cache(torch.tensor([1, 0]))
    keys, _ = torch.ops.qcompile.kv_read(*layer.buffers, 4, torch.float32)
    assert torch.equal(keys[:, :, :10], again.flip(0))
    layer.reset()
    assert int(layer.get_seq_length()) == 0 and not any(buffer.any() for buffer in layer.buffers)
    assert places == [buffer.data_ptr() for buffer in (*layer.buffers, layer.cumulative_length)]


def test_bytes_of_four_bits():
    cache = StaticKVCache(1, 256, 4)
    assert cache.nbytes == 0
    cache.early_initialization(2, 3, 64, torch.bfloat16, torch.device("cpu"))
    assert cache.nbytes == 2 * 2 * 3 * 256 * (64 // 2 + 4)


@pytest.mark.slow
def test_one_graph_serves_every_length(monkeypatch):
    model, ids = build("llama"), torch.randint(3, 128, (2, 14))
    eager, cache = StaticKVCache(2, 128), StaticKVCache(2, 128)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        want = steps(model, eager, ids)
        got = [model(ids[:, :9], past_key_values=cache).logits]
        step = torch.compile(model.forward, backend=backend)
        got += [step(ids[:, at : at + 1], past_key_values=cache).logits for at in range(9, 14)]
    assert len(graphs) == 1 and relative_error(torch.cat(got, 1), want) < 1e-5


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: StaticKVCache(2, 64, 3), "3 bits.*bits=4"),
        (lambda: StaticKVCache(0, 64), "0 layers and 64 tokens"),
        (lambda: StaticQuantizedLayer(64, 4).update(torch.ones(1, 1, 1, 24), torch.ones(1, 1, 1, 24)), "24 channels"),
        (lambda: StaticQuantizedLayer(64, 4).update(torch.ones(1, 1, 1, 32), torch.ones(1, 1, 1, 16)), "16 for values"),
        (lambda: StaticQuantizedLayer(64, 4).offload(), "offloading would move"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
