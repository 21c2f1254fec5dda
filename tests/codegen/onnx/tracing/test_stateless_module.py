"""Modules without a cache: their inputs and outputs by name."""

from __future__ import annotations

import pytest
import torch
from onnx_models import encoder_inputs, trace_encoder
from torch import nn
from zoo import build

from qcompile.codegen.onnx.tracing.stateless_module import StatelessModule


class Several(nn.Module):
    """Two tensors and something else."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        parts = (x + 1, None, x.sum(-1))
        return dict(zip("abc", parts, strict=True)) if self.kind == "named" else parts


@pytest.mark.parametrize("kind,names", [("named", ["a", "c"]), ("tuple", ["output", "output_1"])])
def test_every_tensor_has_a_name(kind, names):
    module = StatelessModule(Several(kind), torch.ones(2, 3))
    assert module.signature.output_names == names and module.signature.input_names == ["input"]
    first, second = module(torch.ones(2, 3))
    assert torch.equal(first, torch.full((2, 3), 2.0)) and torch.equal(second, torch.full((2,), 3.0))


def test_a_batch_of_one_is_traced_as_two():
    module = StatelessModule(Several("named"), {"x": torch.ones(1, 3)})
    assert [v.shape[0] for v in module.sample_inputs()] == [2]
    assert [call[0][0].shape[0] for call in module.reference_calls()] == [2, 1]


def test_a_shorter_text_is_verified_where_the_length_is_dynamic():
    text = trace_encoder(build("bert"), encoder_inputs("bert", True)).module
    assert text.has_dynamic_length
    assert [call[0][0].shape for call in text.reference_calls()] == [(2, 8), (1, 8), (2, 4)]
    image = trace_encoder(build("vit"), encoder_inputs("vit")).module
    assert not image.has_dynamic_length and len(image.reference_calls()) == 2
