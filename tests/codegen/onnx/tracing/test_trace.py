"""A model is traced to a program that computes the same, and is itself not changed."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from onnx_models import encoder_inputs, trace_decoder, trace_encoder
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.ops.matmul_ops import BlockedLinearCall, NBitsLinearCall
from qcompile.codegen.onnx.tracing.trace import max_positions, trace
from qcompile.modules.quant_linear import QuantLinear
from qcompile.recipe.certificate import relative_error


def test_the_program_is_the_module_at_other_sizes_too():
    traced = trace_decoder(build("llama"))
    for arguments, outputs in traced.module.reference_calls():
        assert relative_error(traced.program(*traced.module.flatten(arguments)), outputs) < 1e-5
    encoder = trace_encoder(build("bert"), encoder_inputs("bert", True))
    for arguments, outputs in encoder.module.reference_calls():
        assert relative_error(encoder.program(*arguments), outputs) < 1e-5


@pytest.mark.parametrize("contrib_ops,call", [(True, NBitsLinearCall), (False, BlockedLinearCall)])
def test_quantized_linears_are_operators(contrib_ops, call):
    model = build("llama")
    qcompile.quantize(model, "w4a16", [example("llama")], progress=False)
    sites = sum(isinstance(module, QuantLinear) for module in model.modules())
    program = trace(model, None, contrib_ops).program
    assert len(list(call.find(program))) == sites > 0
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == sites


def test_the_longest_text():
    assert max_positions(tf.GPT2Config(n_positions=77)) == 77
    assert max_positions(tf.MptConfig(max_seq_len=33)) == 33
    assert max_positions(None) == 4096 == max_positions(torch.nn.Identity())
