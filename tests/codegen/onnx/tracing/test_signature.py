"""The signature of a file in its order, and calls of a module."""

from __future__ import annotations

import torch
from torch import nn

from qcompile.codegen.onnx.tracing.signature import Signature, TensorSignature
from qcompile.codegen.onnx.tracing.stateless_module import StatelessModule


class Doubles(StatelessModule):
    def forward(self, x):
        return {"twice": 2 * x, "nested": [x]}


def test_names_are_in_order_and_outputs_are_flat():
    signature = Signature([TensorSignature("b", {0: "batch"}), TensorSignature("a", {})], [TensorSignature("c", {})])
    assert signature.input_names == ["b", "a"] and signature.output_names == ["c"]
    arguments, outputs = Doubles(nn.Identity(), torch.ones(2)).call((torch.ones(2),))
    assert torch.equal(arguments[0], torch.ones(2))
    assert [part.tolist() for part in outputs] == [[2.0, 2.0], [1.0, 1.0]]
