"""The end of training: an ordinary quantized model, or an error and the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile import QuantLinear, RecipeError
from qcompile.modules.adapted_linear import AdaptedLinear


def adapted():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    x = torch.randn(4, 64)
    qcompile.quantize(model, "w4a16-g32", example=x, progress=False)
    qcompile.qa_lora(model, rank=2, alpha=4, example=x)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                module.lora_b.normal_()
    return model, x


def test_the_settled_model_saves_loads_compiles_and_is_frozen(tmp_path):
    model, x = adapted()
    want = model(x).detach()
    qcompile.settle(model)
    assert torch.allclose(model(x), want, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    qcompile.save(model, tmp_path / "out")
    fresh = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    assert torch.equal(qcompile.load(tmp_path / "out", fresh)(x), model(x))
    compiled = torch.compile(model, backend="qcompile")(x)
    assert torch.allclose(compiled, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))


def test_the_settled_model_exports(tmp_path):
    model, x = adapted()
    qcompile.settle(model)
    report = qcompile.export_onnx(model, tmp_path / "out", None, example=x)
    assert report.metrics["onnx relative error"] < 1e-5


def test_hooks_stay_and_buffers_are_the_old_ones():
    model, x = adapted()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    scale = model[0].base_layer.scale
    qcompile.settle(model)
    model(x)
    assert seen == [1] and model[0].scale is scale and isinstance(model[0], QuantLinear)


def test_nothing_to_settle():
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(RecipeError, match="has nothing to settle.*qcompile.train or qcompile.qa_lora"):
            qcompile.settle(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_cannot_be_merged_is_named_and_nothing_changes(value):
    model, x = adapted()
    with torch.no_grad():
        model[2].lora_b[3, 1] = value
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RecipeError, match="^2: its adapter cannot be merged"):
        qcompile.settle(model)
    assert [type(module) for module in model.modules()] == kinds
