"""What a kind of file makes of a traced program."""

from __future__ import annotations

import pytest
import torch
from onnx_models import encoder_inputs, trace_encoder
from torch import nn
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.fusions import int8_embedding
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.codegen.onnx.ops.attention_ops import GroupQueryAttentionCall
from qcompile.codegen.onnx.ops.embedding_ops import GatherNBitsCall
from qcompile.codegen.onnx.rewrite_graph import rewrite
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError
from qcompile.codegen.onnx.tracing.trace import trace
from qcompile.ir.aten_ops import SDPA


@pytest.mark.parametrize("contrib_ops", [True, False])
def test_attentions_are_fused_or_decomposed(contrib_ops):
    traced = trace(build("llama"), None, contrib_ops)
    report, embeddings = rewrite(traced, OnnxOptions(contrib_ops=contrib_ops, last_logits=True), None)
    attentions = len(list(GroupQueryAttentionCall.find(traced.program)))
    assert attentions == (2 if contrib_ops else 0) and not embeddings
    assert not traced.program.graph.find_nodes(op="call_function", target=SDPA)
    assert ("2 attentions in standard operators" in report.notes) == (not contrib_ops)
    assert traced.module.last_logits_only
    assert traced.program(*traced.module.flatten(traced.module.sample_inputs()))[0].shape == (2, 1, 128)


@pytest.mark.parametrize("quantized,float_embeddings", [(True, False), (True, True), (False, False)])
def test_embeddings_are_int8_in_a_quantized_model_unless_it_is_refused(quantized, float_embeddings, monkeypatch):
    monkeypatch.setattr(int8_embedding, "MIN_ELEMENTS", 0)
    model, inputs = build("bert"), encoder_inputs("bert")
    if quantized:
        qcompile.quantize(model, "w8a16", [inputs], example=inputs, progress=False)
    traced = trace_encoder(model, inputs)
    _, embeddings = rewrite(traced, OnnxOptions(float_embeddings=float_embeddings), None)
    expected = 3 if quantized and not float_embeddings else 0
    assert len(embeddings) == len(list(GatherNBitsCall.find(traced.program))) == expected


def test_logits_that_are_not_found_are_refused():
    class Probabilities(nn.Module):
        """A decoder that returns the softmax of its logits."""

        def __init__(self):
            super().__init__()
            self.inner = build("llama")
            self.config = self.inner.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, **inputs):
            out = self.inner(**inputs)
            out.logits = out.logits.softmax(-1)
            return out

    with torch.no_grad():
        assert Probabilities()(**example("llama")).logits.sum(-1).allclose(torch.tensor(1.0))
    with pytest.raises(OnnxUnsupportedError, match="last_logits: the product that makes the logits is not found"):
        rewrite(trace(Probabilities(), None, True), OnnxOptions(last_logits=True), None)
