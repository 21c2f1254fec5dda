"""A token as one compiled call: logits and new keys and values of the model itself, over any length of the past."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.backend import decode_step
from qcompile.backend.decode_step import DecodeStep
from qcompile.backend.options import Options

OPTIONS = Options.read({"verify": False, "on_slow_kernel": "quantize"})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=90)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    qcompile.quantize(model, "w4a16", progress=False, verify=False)
    return model


@pytest.fixture(scope="module")
def step(model):
    return DecodeStep(model, OPTIONS)


@pytest.mark.parametrize("past,room,hidden", [(1, 2, 0), (7, 1, 3), (40, 300, 0)])
def test_the_step_is_the_models_forward(model, step, past, room, hidden):
    ids = torch.randint(90, (1, past + 1))
    mask = torch.ones(1, past + 1, dtype=torch.long)
    mask[:, :hidden] = 0  # padding on the left
    positions = torch.full((1, 1), past - hidden)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        buffers = []
        for layer in cache.layers:
            for part in (layer.keys, layer.values):
                buffers.append(torch.full((1, 2, past + room, 16), torch.nan))
                buffers[-1][:, :, :past] = part
        logits, *rows = step(ids[:, -1:], positions, mask, buffers)
        more = {"attention_mask": mask, "position_ids": positions}
        want = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, **more)
    assert torch.allclose(logits, want.logits, rtol=1e-4, atol=1e-4)
    news = [part[:, :, past:] for layer in want.past_key_values.layers for part in (layer.keys, layer.values)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(rows, news, strict=True))


def test_products_are_merged_and_attention_reads_the_cache_where_it_is(step):
    targets = [str(node.target) for node in step.program.graph.nodes]
    assert targets.count("qcompile_cpu.table_linear.default") == 2 * 4  # qkv, o, gate and up, down
    assert targets.count("qcompile_cpu.attention.default") == 2
    assert not any("scaled_dot_product" in target for target in targets)
    attention = [node for node in step.program.graph.nodes if str(node.target) == "qcompile_cpu.attention.default"]
    assert all(node.args[3] is not None for node in attention)  # the new key, beside the past


def test_the_library_reads_the_weights_where_they_are(model, step):
    """Twice the scales of the head are twice the logits, without another compilation."""
    buffers = [torch.randn(1, 2, 9, 16) for _ in range(4)]
    inputs = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 5), torch.ones(1, 6, dtype=torch.long), buffers
    before = step(*inputs)[0].clone()
    (head,) = [node for node in step.program.graph.nodes if "int8_float_linear" in str(node.target)]
    scale = step.program.weight_of(head.args[2])
    scale.mul_(2)
    after = step(*inputs)[0].clone()
    scale.div_(2)
    assert torch.allclose(after, 2 * before, rtol=1e-5)


@pytest.mark.slow
def test_layers_that_are_equal_are_compiled_once(monkeypatch):
    """The step of blocks is the step of the whole graph, over buffers of any length."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=90)  # fmt: skip
    model, programs = LlamaForCausalLM(config).eval(), []
    qcompile.quantize(model, "w4a16", progress=False, verify=False)
    compile_ahead = decode_step.compile_ahead
    monkeypatch.setattr(decode_step, "compile_ahead", lambda *given: programs.append(given[0]) or compile_ahead(*given))
    steps = [DecodeStep(model, dataclasses.replace(OPTIONS, compile_blocks=blocks)) for blocks in (True, False)]
    assert len(programs) == 4  # the first part, the block, the last part; the whole
    for past, room in ((1, 2), (7, 60)):
        buffers = [torch.randn(1, 2, past + room + layer, 16) for layer in range(6) for _ in range(2)]
        inputs = (
            torch.zeros(1, 1, dtype=torch.long),
            torch.full((1, 1), past),
            torch.ones(1, past + 1, dtype=torch.long),
        )
        got, want = (step(*inputs, buffers) for step in steps)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))
