"""Attentions without a cache as MultiHeadAttention: the same values in torch and in the file."""

from __future__ import annotations

import pytest
from onnx_models import build_encoder, encoder_inputs, load_graph, scale_weights, trace_encoder

import qcompile
from qcompile.codegen.onnx.fuse_all import fuse_all
from qcompile.codegen.onnx.fusions.attention.match_mha import MultiHeadAttentionMatch, match_multi_head_attentions
from qcompile.codegen.onnx.ops.attention_ops import MultiHeadAttentionCall
from qcompile.recipe.certificate import relative_error


@pytest.mark.parametrize(
    "name,padded,attentions,masked",
    [
        ("bert", False, 2, "nothing"), ("bert", True, 2, "padding"), ("vit", False, 2, "nothing"),
        ("whisper_encoder", False, 2, "nothing"), ("clip_text", False, 2, "causal"),
        ("clip_text", True, 2, "causal padding"), ("t5", True, 2, "bias"), ("swin", False, 4, ""),
        ("modernbert", False, 4, ""),
    ],
)  # fmt: skip
def test_attentions_without_a_cache_are_found_and_compute_the_same(name, padded, attentions, masked):
    traced = trace_encoder(build_encoder(name), encoder_inputs(name, padded))
    program, module = traced.program, traced.module
    calls = [module.flatten(arguments) for arguments, _ in module.reference_calls()]
    before = [program(*inputs) for inputs in calls]
    found = match_multi_head_attentions(program)
    assert len(found) == attentions and all(isinstance(a, MultiHeadAttentionMatch) for a in found), found
    for a in found if masked else ():
        kinds = {"causal": a.is_causal, "padding": a.padding_mask is not None, "bias": bool(a.biases)}
        assert " ".join(kind for kind, there in kinds.items() if there) == masked.replace("nothing", "")
    report, _ = fuse_all(program, None)
    fused = [call for _, call in MultiHeadAttentionCall.find(program)]
    assert len(fused) == attentions and not report.skipped
    assert len({call.padding_mask for call in fused}) == 1, "computed once"
    for inputs, want in zip(calls, before, strict=True):
        assert relative_error(program(*inputs), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,padded,recipe",
    [
        ("vit", False, "int8"), ("vit", False, "w4a16"), ("whisper_encoder", False, "int8"), ("clip_text", False, None),
        ("clip_text", True, "w4a16"), ("t5", True, None), ("swin", False, None),
    ],
)  # fmt: skip
def test_encoders_of_all_kinds_in_onnx_runtime(name, padded, recipe, tmp_path):
    model = build_encoder(name)
    scale_weights(model, 5, keep_embedding=False)
    report = qcompile.export_onnx(model, tmp_path / "m", recipe, example=encoder_inputs(name, padded), progress=False)
    assert report.metrics["onnx relative error"] < (0.05 if recipe == "int8" else 1e-4)
    assert load_graph(tmp_path / "m")[1]["MultiHeadAttention"] == (4 if name == "swin" else 2)
