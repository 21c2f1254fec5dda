"""A long prompt over an int8 KV cache is read in chunks: the same values as at once, and verification runs them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from onnx_nodes import bend, every_node, open_session
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from zoo import SIZES

import qcompile
from qcompile.codegen.onnx.lowering import int8_kv_attention
from qcompile.codegen.onnx.lowering.int8_kv_attention import CHUNKED_PREFILL
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe

RECIPE = Recipe("kv", (QuantizeKV(8, static=True), Quantize(Format.parse("int4/group32/zero"), None), Fuse()))
CONFIG = SIZES | dict(max_position_embeddings=512)
LONG = CHUNKED_PREFILL.min_tokens


def quantized(name="llama"):
    torch.manual_seed(0)
    if name == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**CONFIG))
    else:  # a soft cap, and windows that are shorter than a chunk, and longer
        window = {"short windows": 12, "windows": 90}[name]
        model = tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=16, sliding_window=window, **CONFIG))
    model = model.eval().requires_grad_(False)
    qcompile.quantize(model, RECIPE, [{"input_ids": torch.randint(3, 128, (4, 32))}], progress=False)
    return model


def outputs(session, batch, length, past, padding=0):
    """Of a random text behind a random cache; the last tokens are padding."""
    rng = np.random.default_rng(length)
    mask = np.ones((batch, past + length), np.int64)
    mask[0, past + length - padding :] = 0
    feeds = dict(input_ids=rng.integers(3, 128, (batch, length)), attention_mask=mask)
    for cache in session.get_inputs()[2:]:
        feeds[cache.name] = rng.integers(-99, 99, (batch, cache.shape[1], past, cache.shape[3]), dtype=np.int8)
    return [value[:, : length - padding] if not i else value for i, value in enumerate(session.run(None, feeds))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "short windows", "windows"])
def test_chunks_are_the_whole(name, tmp_path, monkeypatch):
    model = quantized(name)
    qcompile.export_onnx(model, tmp_path / "chunks", progress=False)
    monkeypatch.setattr(int8_kv_attention, "CHUNKED_PREFILL", replace(CHUNKED_PREFILL, min_tokens=10**6))
    qcompile.export_onnx(model, tmp_path / "whole", progress=False)
    chunks, whole = (open_session(tmp_path / folder / "model.onnx") for folder in ("chunks", "whole"))
    texts = [(1, length, past) for length in (LONG - 1, LONG, LONG + 1, LONG + 2, 300) for past in (0, 37, 180)]
    for text in [*texts, (2, LONG + 5, 0), (2, LONG + 5, 0, 9), (1, LONG + 5, 0, 9)]:
        got, want = outputs(chunks, *text), outputs(whole, *text)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5, err_msg=str(text))
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            assert np.abs(mine.astype(int) - theirs).max() <= 1, text  # a sum in another order, between two codes
            assert (mine == theirs).mean() > 0.999, text


def test_every_attention_has_chunks(tmp_path):
    qcompile.export_onnx(quantized(), tmp_path / "m", progress=False)
    graph = onnx.load(str(tmp_path / "m/model.onnx"), load_external_data=False).graph
    choices = [node for node in every_node(graph.node) if node.name.endswith("/by_chunks")]
    counts = [
        {branch.g.name: sum(n.op_type == "GroupQueryAttention" for n in branch.g.node) for branch in choice.attribute}
        for choice in choices
    ]
    assert counts == [{"chunks": 4, "at_once": 1}] * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("bent, operator", [("seqlens_k_2", "Add"), ("total_1", "Sub"), ("chunk_size", "Mul")])
def test_wrong_chunks_are_not_exported(bent, operator, tmp_path, monkeypatch):
    bend(monkeypatch, int8_kv_attention, bent, operator)
    with pytest.raises((ExportMismatch, InvalidArgument)):  # wrong values, or sizes that ONNX Runtime refuses
        qcompile.export_onnx(quantized(), tmp_path / "m", progress=False)
    assert not list(tmp_path.iterdir())
