"""Quantized caches are refused, for a reason that holds for the installed ONNX Runtime."""

from __future__ import annotations

import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from zoo import build, example

import qcompile
from qcompile.passes import QuantizeKV
from qcompile.recipe import Recipe, RecipeError


def test_a_quantized_cache_is_refused_before_any_work(tmp_path, monkeypatch):
    model = build("llama")
    own = build("llama")
    qcompile.quantize(own, "kv4", [example("llama")], progress=False)
    monkeypatch.setattr("qcompile.export.quantize", None)
    monkeypatch.setattr("qcompile.codegen.onnx.export.export_module", None)
    for module, recipe in ((model, "kv8"), (model, Recipe("mine", (QuantizeKV(8),))), (own, None), (own, "w4a16")):
        with pytest.raises(RecipeError, match="fixed scales only .* without zero points"):
            qcompile.export_onnx(module, tmp_path / "m", recipe, [example("llama")], progress=False)
    assert not list(tmp_path.iterdir())


def test_the_reason_still_holds():
    """When this turns red, ONNX Runtime can do more: look whether it is what QuantizeKV computes."""
    (schema,) = [s for s in get_all_operator_schema() if s.name == "GroupQueryAttention"]
    inputs = {formal.name for formal in schema.inputs}
    assert {"k_scale", "v_scale"} <= inputs and not any("zero" in name for name in inputs)
    assert "'PER_TENSOR', 'PER_CHANNEL'" in schema.attributes["k_quant_type"].description
