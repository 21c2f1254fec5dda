"""generate() over two graphs gives the tokens of the model that they are of, however it is called."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_text_models import greedy, quantized_llama
from transformers import DynamicCache, StaticCache, TextStreamer

from qcompile.backend.cached_graph import capture_prompt, capture_step
from qcompile.calibration.context_length import context_length
from qcompile.codegen.cpu.native_kernels import load_native_kernels
from qcompile.generation.growing_cache import GrowingLayer
from qcompile.generation.packaged_causal_lm import PackagedCausalLM


@pytest.fixture(scope="module")
def models():
    """The model, and one of its two graphs, which run here as they were captured."""
    load_native_kernels()
    model = quantized_llama()
    graphs = [capture(model).program for capture in (capture_prompt, capture_step)]
    runs = [lambda inputs, graph=graph: list(graph(*inputs)) for graph in graphs]
    return model, PackagedCausalLM(copy.deepcopy(model.config), *runs, [(2, 16)] * 4, torch.float32)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.8}, {"repetition_penalty": 1.3}, {"use_cache": False}],
    ids=lambda options: " ".join(map(str, options)) or "greedy",
)
def test_the_tokens_are_the_models_own(models, options, length):
    ids, found = torch.randint(90, (1, length)), []
    for model in models:
        torch.manual_seed(1)
        found.append(greedy(model, ids, **options))
    assert torch.equal(*found)


def test_padding_on_the_left(models):
    ids = torch.randint(1, 90, (1, 7))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert torch.equal(*(greedy(model, ids, attention_mask=mask) for model in models))


def test_a_streamer_and_an_end_token(models):
    class Words(TextStreamer):
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append(None)

    ids, seen = torch.randint(90, (1, 4)), []
    want = greedy(models[0], ids)
    end = int(want[0, 7])
    got = greedy(models[1], ids, min_new_tokens=1, eos_token_id=end, streamer=Words(None))
    assert seen == [*got[0].tolist(), None] and got[0, -1] == end and torch.equal(got, want[:, : got.shape[1]])


def test_a_conversation_reads_only_what_is_new(models):
    plain, packaged = models
    ids, caches = torch.randint(90, (1, 20)), (DynamicCache(config=plain.config), DynamicCache())
    with torch.no_grad():
        for model, cache in zip(models, caches, strict=True):
            model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
        for start, end in ((6, 7), (7, 12), (12, 13), (13, 20)):
            want, got = (
                m(input_ids=ids[:, start:end], past_key_values=c, use_cache=True).logits[:, -1:]
                for m, c in zip(models, caches, strict=True)
            )
            assert torch.allclose(want, got, rtol=1e-4, atol=1e-4)
        assert caches[1].get_seq_length() == 20
        assert all(type(layer) is GrowingLayer for layer in caches[1].layers)
        shared = copy.deepcopy(caches[1])
        first, again = (packaged(input_ids=ids[:, :1], past_key_values=c).logits for c in (caches[1], shared))
        caches[1].crop(-8)
        third = packaged(input_ids=ids[:, 13:], past_key_values=caches[1])
    assert torch.equal(first, again) and torch.equal(third.logits, got)


def test_what_the_graphs_do_not_compute_is_refused(models):
    plain, packaged = models
    ids = torch.randint(90, (1, 5))
    with pytest.raises(ValueError, match="one text"):
        packaged(input_ids=ids.expand(2, 5))
    with pytest.raises(ValueError, match="one text"):
        packaged(inputs_embeds=None)
    with pytest.raises(ValueError, match="one text"):
        greedy(packaged, ids, num_beams=2)
    with pytest.raises(ValueError, match="last token"):
        packaged(input_ids=ids, logits_to_keep=0)
    with pytest.raises(ValueError, match="no output_attentions"):
        packaged(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 4\]"):
        packaged(input_ids=ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="StaticCache"):
        packaged(input_ids=ids, past_key_values=StaticCache(config=plain.config, max_cache_len=32))
    with torch.no_grad():
        short = DynamicCache()
        short.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="has 1 layers"):
        packaged(input_ids=ids, past_key_values=short)
    with pytest.raises(TypeError, match="copy the .pt2"):
        packaged.save_pretrained("anywhere")


def test_the_form_of_the_output(models):
    ids = torch.randint(90, (1, 5))
    output = models[1](input_ids=ids, use_cache=False)
    assert output.past_key_values is None and output.logits.shape == (1, 1, 90) and not output.logits.requires_grad
    logits, cache = models[1](input_ids=ids, return_dict=False)
    assert torch.equal(logits, output.logits) and cache.get_seq_length() == 5
    assert context_length(models[1]) == context_length(models[0])
    assert models[1].device.type == "cpu" and models[1].dtype == torch.float32 and models[1].can_generate()
