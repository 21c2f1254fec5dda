"""A causal LM whose cache is a list of tensors computes what the model does."""

from __future__ import annotations

import torch
from zoo import build

from qcompile.codegen.onnx.lowering.int8_kv_attention import CHUNKED_PREFILL
from qcompile.codegen.onnx.tracing.cached_decoder import CachedDecoder
from qcompile.modules.kv_constants import Scales


def decoder(name="llama", positions=64):
    return CachedDecoder(build(name), positions)


def test_a_text_in_two_pieces_is_the_text():
    module = decoder()
    ids, mask = torch.randint(3, 128, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    empty = [torch.zeros(2, heads, 0, size) for heads, size in module.cache_shapes]
    with torch.no_grad():
        want = module.model(input_ids=ids).logits
        first, cache = module(ids[:, :5], mask[:, :5], empty)
        then, grown = module(ids[:, 5:], mask, cache)
        assert torch.allclose(torch.cat([first, then], 1), want, atol=1e-5)
        assert [part.shape[2] for part in grown] == [9] * len(module.cache_shapes)
        module.return_last_logits()
        last, _ = module(ids[:, 5:], mask, cache)
    assert torch.equal(last, then[:, -1:]) and module.signature.outputs[0].axes[1] == 1


def test_the_signature_follows_the_layers():
    module = decoder()
    names = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert module.signature.input_names == ["input_ids", "attention_mask", *[f"past_key_values.{n}" for n in names]]
    assert module.signature.output_names == ["logits", *[f"present.{n}" for n in names]]
    assert module.cache_shapes == [(2, 16)] * 4
    arguments = module.sample_inputs(3, 2, 4)
    assert [tuple(t.shape) for t in module.flatten(arguments)] == [(3, 2), (3, 6), *[(3, 2, 4, 16)] * 4]
    assert len(module.flat_dynamic_shapes()) == len(module.flatten(arguments))


def test_calls_that_a_file_is_verified_with_cover_every_kernel():
    module = decoder(positions=256)
    with torch.no_grad():
        calls = module.reference_calls()
        lengths = [(ids.shape[0], ids.shape[1], mask.shape[1] - ids.shape[1]) for (ids, mask, _), _ in calls]
        assert lengths == [(1, 7, 0), (2, 4, 0), (1, 1, 7), (1, 3, 7), (1, 6, 7), (2, 1, 4)]
        module.int8_scales = module.expand_scales(Scales([(torch.ones(2, 16), torch.ones(2, 16))] * 2))
        module.model.config.max_position_embeddings = 256
        longest = module.reference_calls()[-1][0][0]
    assert longest.shape == (1, CHUNKED_PREFILL.min_tokens + 3)


def test_scales_of_one_head_are_those_of_every_head():
    module = decoder()
    keys, values = torch.rand(1, 16, dtype=torch.float16), torch.rand(2, 1)
    (of_keys, of_values), _ = module.expand_scales(Scales([(keys, values)] * 2))
    assert of_keys.dtype is torch.float32 and torch.equal(of_keys, keys.float().expand(2, 16))
    assert torch.equal(of_values, values.expand(2, 16))
