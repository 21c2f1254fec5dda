"""Graphs for ExecuTorch: a causal LM with its cache, one forward of a module, and what cannot be one."""

from __future__ import annotations

import copy

import pytest
import torch
from served_models import decoder, ids, quantized
from torch import nn

from qcompile.api.edge_graph import CACHE_LENGTH, EdgeCall
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.torchao_weights import take_intx_weights

ACT = "int8/row/zero"


@pytest.fixture(scope="module")
def graph():
    """A quantized decoder, its call, and the exported graph with weights of torchao, as a module."""
    model = quantized("int4/group32/bf16", ACT)
    call = EdgeCall.of(model, None, 32)
    work = copy.deepcopy(model)
    take_intx_weights(work)
    return model, call, call.export(work).module()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_causal_lm_reads_any_number_of_tokens_behind_its_cache(graph):
    model, _, program = graph
    text = ids()[:1]
    with torch.no_grad():
        expected = model(text).logits
        whole = program(input_ids=text, cache_position=torch.arange(10))
        parts, cuts = [], [0, 4, 9, 10]
        for start, end in zip(cuts, cuts[1:], strict=False):
            parts.append(program(input_ids=text[:, start:end], cache_position=torch.arange(start, end)))
    assert torch.allclose(whole, expected, atol=2e-2) and torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert float((decoder()(text).logits - expected).abs().max()) > 0.1, "quantization changes more"


def test_what_a_causal_lm_says_of_itself(graph):
    model, call, _ = graph
    assert call.tokens == 32 and call.inputs == "token ids int64 [1, S] and their positions int64 [S], below 32"
    assert call.facts["get_max_seq_len"] == 31 and call.facts["get_max_context_len"] == 32
    assert call.facts["get_vocab_size"] == 96 and call.facts["use_kv_cache"] and call.facts["enable_dynamic_shape"]
    assert call.facts["get_eos_ids"] == [2] and call.facts["get_bos_id"] == 1
    model = decoder()
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = [3, 4], None
    facts = EdgeCall.of(model, None, None).facts
    assert facts["get_eos_ids"] == [3, 4] and "get_bos_id" not in facts


def test_checks_are_a_prompt_and_a_token_behind_it(graph):
    model, call, _ = graph
    (prompt, first), (token, second) = call.checks
    assert prompt.shape[1] == len(first) > 1 and token.shape == (1, 1) and second.tolist() == [len(first)]
    expected = call.expected(model)
    with torch.no_grad():
        logits = model(torch.cat([prompt, token], 1)).logits
    assert torch.equal(expected[0][0], logits[:, :-1]) and torch.equal(expected[1][0], logits[:, -1:])


def test_the_length_is_what_the_model_keeps():
    model = decoder()
    assert EdgeCall.of(model, None, None).tokens == 64 < CACHE_LENGTH, "the context of the model"
    for length in (3, 65, -1):
        with pytest.raises(ExportError, match=f"length={length}: the model keeps 4 to 64 tokens. Fix: choose one"):
            EdgeCall.of(model, None, length)
    model.config.sliding_window = 16  # a cache of fixed size has no window that slides
    assert EdgeCall.of(model, None, None).tokens == 16
    with pytest.raises(ExportError, match="the model keeps 4 to 16 tokens"):
        EdgeCall.of(model, None, 17)
    model.config.max_position_embeddings, model.config.sliding_window = 9000, None
    assert EdgeCall.of(model, None, None).tokens == CACHE_LENGTH and EdgeCall.of(model, None, 5000).tokens == 5000


def test_a_module_has_the_shapes_of_its_example():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.ones(2, 4)
    call = EdgeCall.of(model, x, None)
    assert call.tokens == 0 and call.facts == {} and call.inputs == "float32 [2, 4]"
    assert [[t.tolist() for t in out] for out in call.expected(model)] == [[model(x).tolist()]]
    with pytest.raises(ExportError, match="an example has a shape, and length=8 was given"):
        EdgeCall.of(model, x, 8)
    with pytest.raises(ExportError, match="Sequential is no causal LM of transformers. Fix: give example="):
        EdgeCall.of(model, None, None)


class Named(nn.Module):
    def forward(self, a, b, flag=True):
        return {"sum": a + b, "flag": flag, "product": (a * b,)}


def test_arguments_and_results_are_the_tensors_in_their_order():
    call = EdgeCall.of(Named(), {"b": torch.full((2,), 3.0), "a": torch.full((2,), 2.0)}, None)
    (inputs,) = call.checks
    assert [t[0].item() for t in inputs] == [3, 2], "as the caller wrote them"
    assert [t[0].item() for t in call.expected(Named())[0]] == [5, 6]
    assert sorted(call.export(Named()).module()(**call.kwargs)) == ["flag", "product", "sum"]


class Untraceable(nn.Module):
    def forward(self, x):
        return x[: int(x.sum().item())] if x.sum() > 0 else x.numpy()


def test_a_model_that_is_no_graph_is_named():
    call = EdgeCall.of(Untraceable(), torch.ones(3), None)
    with pytest.raises(ExportError, match=r"Untraceable cannot be exported \(.*Fix: give example="):
        call.export(Untraceable())
