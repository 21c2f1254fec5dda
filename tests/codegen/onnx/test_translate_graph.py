"""From a program to an ONNX graph: types and shapes of its outputs, and the program as a module."""

from __future__ import annotations

import onnx
import onnxruntime
import torch
from onnx_models import trace_decoder
from torch import nn
from zoo import build

import qcompile
from qcompile.codegen.onnx.translate_graph import to_module, translate
from qcompile.ir.capture import capture


def test_outputs_of_other_types_keep_them(tmp_path):
    """The exporter knows no types behind our own operators; a file must not say float of integers."""

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(32, 5)

        def forward(self, x):
            scores = self.scores(x)
            return scores, scores.argmax(-1), scores > 0

    model, x = Classes().eval(), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    qcompile.export_onnx(model, tmp_path / "m", "w8a16", [{"x": x}], example={"x": x}, progress=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m/model.onnx"))
    assert [o.type for o in session.get_outputs()] == ["tensor(float)", "tensor(int64)", "tensor(bool)"]
    for got, want in zip(session.run(None, {"x": x.numpy()})[1:], model(x)[1:], strict=True):
        assert (torch.from_numpy(got) == want).float().mean() > 0.9, "near ties of rounded weights at most"


def test_dynamic_sizes_have_the_names_that_tools_expect(tmp_path):
    traced = trace_decoder(build("llama"))
    translate(traced, tmp_path / "model.onnx", contrib_ops=True)
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph

    def shape(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    shapes = {value.name: shape(value) for value in (*graph.input, *graph.output)}
    assert shapes["input_ids"] == ["batch", "sequence"] and shapes["attention_mask"] == ["batch", "total_sequence"]
    assert shapes["past_key_values.1.value"] == ["batch", 2, "past_sequence", 16]
    assert shapes["present.0.key"] == ["batch", 2, "total_sequence", 16]
    assert shapes["logits"] == ["batch", "sequence", 128]
    assert not any(node.metadata_props for node in graph.node)


def test_names_that_become_one_stay_two_weights():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ParameterDict({"b": nn.Parameter(torch.ones(3))})
            self.a_b = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, x):
            return x * self.a["b"] + self.a_b

    module = to_module(capture(Names(), (torch.ones(3),), {}))
    assert len(dict(module.named_buffers())) == 2 and module(torch.ones(3))[0].tolist() == [3.0] * 3
