"""`qcompile.export_onnx`: what is refused before any work, and what a failure leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.api import export_onnx as module
from qcompile.recipe.recipe import RecipeError

ENCODER = dict(example=torch.randn(2, 8))


@pytest.mark.parametrize(
    "options,error,words",
    [
        (dict(last_logit=True), TypeError, "unknown ONNX option .last_logit."),
        (dict(accuracy_level=2), RecipeError, "accuracy_level 2 is unknown"),
        (dict(**ENCODER, last_logits=True), RecipeError, "for decoders"),
        (dict(**ENCODER, chunk=16), RecipeError, "for decoders"),
        (dict(pooling="mean"), ValueError, "pooling needs example"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "quantize", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(error, match=words):
        qcompile.export_onnx(nn.Sequential(nn.Linear(8, 8)), tmp_path / "m", "int8", progress=False, **options)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("options", [dict(contrib_ops=False), ENCODER])
def test_a_file_without_an_int8_cache_is_refused_one(options, tmp_path):
    recipe = qcompile.Recipe("kv", (qcompile.passes.QuantizeKV(8, static=True),))
    with pytest.raises(RecipeError, match="QuantizeKV"):
        qcompile.export_onnx(build("llama"), tmp_path / "m", recipe, [example("llama")], progress=False, **options)


def test_a_full_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "quantize", lambda *a, **k: pytest.fail("work began"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        qcompile.export_onnx(nn.Linear(8, 8), tmp_path, "int8", example=torch.randn(2, 8), progress=False)


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("broken")

    monkeypatch.setattr(module, "quantize", broken)
    with pytest.raises(ValueError, match="broken"):
        qcompile.export_onnx(nn.Linear(8, 8), tmp_path / "m", "int8", example=torch.randn(2, 8), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_options_reach_the_file_and_the_model_stays(tmp_path):
    import onnx

    model = nn.Sequential(nn.Linear(64, 48))
    before = model[0].weight.detach().clone()
    for contrib in (True, False):
        place = tmp_path / str(contrib)
        report = qcompile.export_onnx(
            model, place, "w4a16", example=torch.randn(2, 3, 64), contrib_ops=contrib, progress=False
        )
        assert report.recipe == "w4a16" and report.metrics["onnx relative error"] < 1e-4
        nodes = onnx.load(str(place / "model.onnx"), load_external_data=False).graph.node
        assert ("MatMulNBits" in {node.op_type for node in nodes}) == contrib
    assert isinstance(model[0], nn.Linear) and torch.equal(model[0].weight, before)
