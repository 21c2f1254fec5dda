"""Whole exports: what they generate, how exact they are, and that a wrong one leaves nothing."""

from __future__ import annotations

import os

import pytest
import torch
from onnx_models import generated
from quant_linears import linear
from torch import nn
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.tracing import onnx_linear
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.generation.onnx_session import Session


@pytest.mark.parametrize("recipe", [None, "int8", "w4a16", "w4a8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoder_generates_the_same(name, recipe, tmp_path):
    model = build(name)
    if recipe:
        qcompile.quantize(model, recipe, [example(name)], progress=False)
    qcompile.export_onnx(model, tmp_path / "m", progress=False)
    ids = torch.tensor([[5, 9, 17, 33]])
    assert list(Session(tmp_path / "m").stream(ids, 12)) == generated(model, ids)


def test_encoder(tmp_path):
    report = qcompile.export_onnx(build("bert"), tmp_path / "m", "int8", example=example("bert"), progress=False)
    assert report.metrics["onnx relative error"] < 0.05


def test_accuracy_level(tmp_path):
    model = build("llama")
    one = qcompile.export_onnx(model, tmp_path / "1", "w4a16", accuracy_level=1, progress=False)
    four = qcompile.export_onnx(model, tmp_path / "4", "w4a16", progress=False)
    assert one.metrics["onnx relative error as run"] == one.metrics["onnx relative error"] < 1e-5
    assert 1e-4 < four.metrics["onnx relative error as run"] < 0.1
    with pytest.raises(ValueError, match="accuracy_level 2"):  # before a recipe that does not exist is looked up
        qcompile.export_onnx(model, tmp_path / "2", "no such recipe", accuracy_level=2)


def test_a_wrong_export_leaves_nothing(tmp_path, monkeypatch):
    real = onnx_linear.to_matmul_nbits

    def wrong(weight):
        codes, scales, zeros = real(weight)
        return codes, scales * 1.1, zeros

    monkeypatch.setattr(onnx_linear, "to_matmul_nbits", wrong)
    model = nn.Sequential(linear("int4/group32", "", 64))
    with pytest.raises(ExportMismatch, match="differs from the module"):
        qcompile.export_onnx(model, tmp_path / "m", example=torch.randn(2, 64))
    assert os.listdir(tmp_path) == []


def test_a_model_in_another_dtype_is_exported_in_float32_and_not_changed(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8)).double()
    report = qcompile.export_onnx(model, tmp_path / "m", example=torch.randn(2, 16), progress=False)
    assert report.metrics["onnx relative error"] < 1e-5 and model[0].weight.dtype is torch.float64
