"""The graphs of a causal LM behind a cache are the model's own forward, for any number of tokens read and to read."""

from __future__ import annotations

import pytest
import torch
from tiny_text_models import quantized_llama

from qcompile.backend.cached_graph import capture_prompt, capture_step


@pytest.fixture(scope="module")
def model():
    return quantized_llama()


@pytest.fixture(scope="module")
def graphs(model):
    return {"prompt": capture_prompt(model), "step": capture_step(model)}


@pytest.mark.parametrize("name,past,tokens,hidden", [
    ("prompt", 0, 1, 0), ("prompt", 0, 9, 0), ("prompt", 0, 7, 3), ("prompt", 5, 2, 0), ("prompt", 30, 4, 2),
    ("prompt", 1, 1, 0), ("step", 0, 1, 0), ("step", 1, 1, 0), ("step", 40, 1, 6),
])  # fmt: skip
def test_a_graph_is_the_models_forward(model, graphs, name, past, tokens, hidden):
    ids = torch.randint(90, (1, past + tokens))
    mask = torch.ones_like(ids)
    mask[:, :hidden] = 0  # padding on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        cache, buffers = None, [torch.full((1, 2, past + 3, 16), torch.nan) for _ in range(4)]
        if past:
            read = {"attention_mask": mask[:, :past], "position_ids": positions[:, :past]}
            cache = model(input_ids=ids[:, :past], use_cache=True, **read).past_key_values
            parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[:, :, :past] = part
        logits, *rows = graphs[name].program(ids[:, past:], positions[:, past:], mask, *buffers)
        more = {"attention_mask": mask, "position_ids": positions[:, past:], "past_key_values": cache}
        want = model(input_ids=ids[:, past:], use_cache=True, **more)
    assert logits.shape == (1, 1, 90) and torch.allclose(logits, want.logits[:, -1:], rtol=1e-4, atol=1e-4)
    news = [part[:, :, past:] for layer in want.past_key_values.layers for part in (layer.keys, layer.values)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(rows, news, strict=True))


def test_only_the_number_of_tokens_is_fixed_in_a_step(graphs):
    for name, fixed in (("prompt", False), ("step", True)):
        ids, positions, mask, *buffers = (node.meta["val"].shape for node in graphs[name].program.inputs)
        assert isinstance(ids[1], int) == isinstance(positions[1], int) == fixed
        assert not isinstance(mask[1], int) and not any(isinstance(shape[2], int) for shape in buffers)
