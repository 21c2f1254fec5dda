"""Attention to a quantized static cache becomes kv_attend, where it has few positions and a mask."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from kv_caches import random_states

from qcompile.codegen.triton.lower_kv_attention import lower_kv_attentions
from qcompile.ir.capture import capture, capture_dynamo
from qcompile.ir.node_meta import DYNAMO_INDEX
from qcompile.modules.static_kv_cache import StaticKVCache, StaticQuantizedLayer

ops = torch.ops.qcompile


class Attention(torch.nn.Module):
    """Writes into a cache, and attends to what it reads of it, as transformers' models do."""

    def __init__(self, bits, repeats=2, additive=False, causal=False):
        super().__init__()
        self.bits, self.repeats, self.additive, self.causal = bits, repeats, additive, causal

    def forward(self, query, key, value, keys, key_scales, values, value_scales, length):
        buffers = keys, key_scales, values, value_scales
        ops.kv_write(key, value, *buffers, length, self.bits)
        last = length + torch.arange(query.shape[2])
        length.add_(key.shape[2])
        found = ops.kv_read(*buffers, self.bits, query.dtype)
        repeated = []
        for states in found:
            batch, heads, tokens, width = states.shape
            wide = states[:, :, None].expand(batch, heads, self.repeats, tokens, width)
            repeated.append(wide.reshape(batch, heads * self.repeats, tokens, width))
        mask = (torch.arange(keys.shape[2]) <= last[:, None])[None, None].expand(query.shape[0], 1, -1, -1)
        if self.additive:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        if self.causal:
            return torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.2)
        return torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.2) * 2


def inputs(positions, width=64, bits=4, dtype=torch.bfloat16):
    layer = StaticQuantizedLayer(200, bits)
    past = random_states(2, 2, 40, width, seed=1, dtype=dtype)
    layer.update(past, past)
    new = [random_states(2, 2, positions, width, seed=seed, dtype=dtype) for seed in (2, 3)]
    query = random_states(2, 4, positions, width, seed=4, dtype=dtype)
    return [query, *new, *layer.buffers, layer.cumulative_length]


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("additive", [False, True])
def test_the_codes_are_attended_to(positions, bits, additive):
    given, model = inputs(positions, bits=bits), Attention(bits, additive=additive)
    program = capture(model, tuple(copies(given)))
    mine, theirs = copies(given), copies(given)
    (want,) = program(*theirs)
    assert lower_kv_attentions(program) == 1
    found = targets(program)
    assert ops.kv_read.default not in found and ops.kv_write.default in found and ops.kv_attend.default in found
    (got,) = program(*mine)
    assert float((got - want).float().norm() / want.float().norm()) < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) and int(mine[-1]) == 40 + positions


@pytest.mark.parametrize(
    "given,settings",
    [
        (inputs(17), {}),  # a prompt
        (inputs(1, width=80), {}),
        (inputs(1, dtype=torch.float32), {}),
        (inputs(2), dict(causal=True)),  # whose positions are those of the buffer, not of the tokens
    ],
)
def test_what_no_kernel_computes_is_read(given, settings):
    program = capture(Attention(4, **settings), tuple(copies(given)))
    assert lower_kv_attentions(program) == 0 and ops.kv_read.default in targets(program)


def test_a_cache_that_is_written_twice_is_read():
    """Attention over the codes would stand behind the second write."""

    class Twice(Attention):
        def forward(self, query, key, value, *cache):
            found = super().forward(query, key, value, *cache)
            ops.kv_write(key, value, *cache, self.bits)
            return found

    program = capture(Twice(4), tuple(inputs(1)))
    assert lower_kv_attentions(program) == 0


def test_a_decode_step_of_a_model_reads_no_cache():
    """As Dynamo hands it over: one graph, every layer's attention over the codes, the same logits."""
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, head_dim=64)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).bfloat16().eval()
    model.requires_grad_(False)
    ids, caches, made = torch.randint(3, 64, (2, 9)), [StaticKVCache(2, 128) for _ in range(2)], []
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0  # padded at the left

    def backend(graph_module, given):
        program = capture_dynamo(graph_module, given)
        made.append(lower_kv_attentions(program))
        assert ops.kv_read.default not in targets(program)
        places = [node.meta[DYNAMO_INDEX] for node in program.placeholders]
        return lambda *args: program.graph_module(*(args[place] for place in places))

    for cache in caches:
        cache.early_initialization(2, 2, 64, torch.bfloat16, torch.device("cpu"))
        with torch.no_grad():
            model(ids[:, :7], past_key_values=cache, attention_mask=mask[:, :7])
    step = torch.compile(model.forward, backend=backend, dynamic=False)
    for at in (7, 8):
        given = dict(input_ids=ids[:, at : at + 1], attention_mask=mask[:, : at + 1])
        with torch.no_grad():
            want = model(past_key_values=caches[0], **given).logits.float()
            got = step(past_key_values=caches[1], **given).logits.float()
        assert float((got - want).norm() / want.norm()) < 2e-2
    assert set(made) == {2} and int(caches[1].layers[1].get_seq_length()) == 9


class Uncounted(torch.nn.Module):
    """Writes and attends, and counts the new tokens elsewhere, or by another number."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, query, key, value, keys, key_scales, values, value_scales, length):
        buffers = keys, key_scales, values, value_scales
        ops.kv_write(key, value, *buffers, length, 4)
        if self.where == "by another number":
            length.add_(key.shape[2] + 1)
        states = [s.repeat_interleave(2, 1) for s in ops.kv_read(*buffers, 4, query.dtype)]
        mask = (torch.arange(keys.shape[2]) <= 40)[None, None, None].expand(query.shape[0], 1, query.shape[2], -1)
        out = torch.nn.functional.scaled_dot_product_attention(query, *states, attn_mask=mask, scale=0.2)
        if self.where == "behind":
            length.add_(key.shape[2])
        return out


@pytest.mark.parametrize("where", ["nowhere", "behind", "by another number"])
def test_the_length_must_count_what_was_written(where):
    """kv_attend takes the last tokens of the length for the queries': another length is another attention."""
    program = capture(Uncounted(where), tuple(inputs(3)))
    assert lower_kv_attentions(program) == 0
