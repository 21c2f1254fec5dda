"""Attentions with a cache as GroupQueryAttention: the same values in torch and in the file."""

from __future__ import annotations

import pytest
import torch
from onnx_models import ALIBI, LENGTH, build_decoder, generated, load_graph, scale_weights, trace_decoder
from zoo import build

import qcompile
from qcompile.codegen.onnx.fuse_all import fuse_all
from qcompile.codegen.onnx.fusions.attention.match_gqa import GroupQueryAttentionMatch, match_group_query_attentions
from qcompile.codegen.onnx.ops.attention_ops import AttentionLengthsCall, GroupQueryAttentionCall
from qcompile.generation.onnx_session import Session
from qcompile.recipe.certificate import relative_error

DECODERS = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "mixtral",
    "bloom",
]  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.slow
def test_attentions_with_a_cache_are_found_and_compute_the_same(name):
    traced = trace_decoder(build(name))
    program, module = traced.program, traced.module
    found = match_group_query_attentions(program, LENGTH)
    assert len(found) == 2 and all(isinstance(a, GroupQueryAttentionMatch) for a in found)
    calls = [module.flatten(arguments) for arguments, _ in module.reference_calls()]
    before = [program(*inputs) for inputs in calls]
    report, _ = fuse_all(program, LENGTH)
    fused = list(GroupQueryAttentionCall.find(program))
    assert len(fused) == (0 if name == "gpt_neox" else 2)  # it rotates 4 channels, the kernel takes 16
    assert len(report.skipped) == (2 if name == "gpt_neox" else 0)
    for inputs, want in zip(calls, before, strict=True):
        assert relative_error(program(*inputs), want) < 1e-5


def test_what_attentions_share_is_there_once():
    program = trace_decoder(build("bloom")).program
    fuse_all(program, LENGTH)
    (first, second) = (call for _, call in GroupQueryAttentionCall.find(program))
    assert len(list(AttentionLengthsCall.find(program))) == 1
    assert first.bias is second.bias and first.bias is not None and first.seqlens_k is second.seqlens_k
    program = trace_decoder(build("llama")).program
    fuse_all(program, LENGTH)
    (first, second) = (call for _, call in GroupQueryAttentionCall.find(program))
    assert first.cos is second.cos and first.sin is second.sin and first.cos is not first.sin
    assert first.key is None and first.value is None, "packed into the query"


def test_the_length_of_a_cache_is_read_of_the_mask():
    """A runtime may pass a longer buffer: nothing but the attentions may know its length."""
    program = trace_decoder(build("llama")).program
    fuse_all(program, LENGTH)
    sizes = {user for cache in program.inputs[2:] for user in cache.users if user.target is torch.ops.aten.sym_size.int}
    assert all(user.args[1] != 2 for user in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALIBI, "gemma2"])
@pytest.mark.parametrize("recipe", [None, "w4a16"])
def test_the_file_of_capped_or_biased_scores_generates_the_same(name, recipe, tmp_path):
    model = build_decoder(name)
    scale_weights(model, 6)
    ids = torch.tensor([[5, 9, 17, 33, 90, 8, 51, 70]])
    if recipe:
        qcompile.quantize(model, recipe, [{"input_ids": ids}], progress=False)
    report = qcompile.export_onnx(model, tmp_path / "m", accuracy_level=1, progress=False)
    graph, found = load_graph(tmp_path / "m")
    attention = next(n for n in graph.node if n.op_type == "GroupQueryAttention")
    assert found["GroupQueryAttention"] == 2 and not found["Softmax"]
    assert not next(p for p in report.passes if "operators" in p.name).skipped
    assert (len(attention.input) > 10 and bool(attention.input[10])) == (name in ALIBI)
    cap = next(a.f for a in attention.attribute if a.name == "softcap")
    assert cap == pytest.approx(50.0 if name == "gemma2" else 0.0)
    assert list(Session(tmp_path / "m").stream(ids, 12)) == generated(model, ids)
