"""Activations are found by what they compute."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_models import load_graph
from torch import nn

import qcompile


def run(folder, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


SPELLINGS = {
    "erf": lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
    "tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    "gate": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * x.sigmoid(),
    "other": lambda x: 0.5 * x * (1 + torch.tanh(0.7 * x)),
    "two": lambda x: x * torch.sigmoid(x.flip(-1)),
    "near": lambda x: x * (0.98 * torch.sigmoid(1.702 * x)),
    "square": lambda x: x * torch.relu(x),
}


class Spelled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(24, 32), nn.Linear(32, 8), SPELLINGS[kind]

    def forward(self, input):
        return self.second(self.activation(self.first(input)))


@pytest.mark.parametrize(
    "kind,operator",
    [("erf", "BiasGelu"), ("tanh", "FastGelu"), ("gate", "QuickGelu"), ("silu", "QuickGelu"), ("two", None),
     ("square", None), ("near", None)],
)  # fmt: skip
def test_activations_are_found_by_what_they_compute(kind, operator, tmp_path):
    torch.manual_seed(0)
    model = Spelled(kind).eval().requires_grad_(False)
    x = torch.randn(2, 5, 24) * 3
    report = qcompile.export_onnx(model, tmp_path / "m", example=x, progress=False)
    _, counts = load_graph(tmp_path / "m")
    found = {name for name in counts if name.endswith("Gelu")}
    assert found == ({operator} if operator else set())
    assert np.allclose(run(tmp_path / "m", x), model(x), atol=1e-4)
    assert report.metrics["onnx relative error"] < 1e-5


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_tanh_that_is_no_gelu_is_a_gate(tmp_path):
    """0.5 x (1 + tanh a x) is x sigmoid(2 a x): an operator knows it by that name."""
    x = torch.randn(2, 5, 24)
    model = nn.Sequential(nn.Linear(24, 32), Activation(SPELLINGS["other"])).eval()
    qcompile.export_onnx(model, tmp_path / "m", example=x, progress=False)
    graph, counts = load_graph(tmp_path / "m")
    (node,) = [n for n in graph.node if n.op_type == "QuickGelu"]
    assert node.attribute[0].f == pytest.approx(1.4) and not counts["Tanh"]
