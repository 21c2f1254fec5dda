"""Faults in one variant, or in what other processors run, are found before a file is handed over."""

from __future__ import annotations

from unittest.mock import create_autospec

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_nodes import bend, graph_of
from quant_linears import linear
from torch import nn
from zoo import build, example

import qcompile
from qcompile.codegen.onnx import variants
from qcompile.codegen.onnx.lowering import matmul_integer
from qcompile.codegen.onnx.tracing.cached_decoder import CachedDecoder
from qcompile.codegen.onnx.tracing.stateless_module import StatelessModule
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.numerics.int8_matmul import processor

DUAL = "int4-cpu"
DECODER = create_autospec(CachedDecoder, instance=True)


def test_a_wrong_zero_point_is_found(tmp_path, monkeypatch):
    """Variants are verified one by one: a fault in the int8 weights alone must not pass."""
    real = variants.lower

    def wrong(model, variant, **options):
        lowered = real(model, variant, **options)
        for node in lowered.graph:
            if node.op_type == "Sub" and node.name.endswith("int8_weight/levels"):
                node.op_type = "Add"  # the zero point
        return lowered

    monkeypatch.setattr(variants, "lower", wrong)
    with pytest.raises(ExportMismatch, match="differs from the module"):
        qcompile.export_onnx(build("llama"), tmp_path / "m", DUAL, [example("llama")], progress=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.skipif(processor() not in ("vnni", "amx"), reason="this processor runs that branch itself")
def test_what_other_processors_run_is_verified(tmp_path, monkeypatch):
    """A fault in the branch that this processor does not take must not pass."""
    bend(monkeypatch, matmul_integer, "unsigned", "Max")
    with pytest.raises(ExportMismatch, match="differs from the module"):
        qcompile.export_onnx(build("llama"), tmp_path / "m", DUAL, [example("llama")], progress=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize("recipe", ["w4a16", DUAL])  # one variant, two
def test_the_file_has_the_accuracy_level_that_was_requested(recipe, accuracy_level, tmp_path):
    """In branches too; every variant was verified at level 1."""
    options = dict(accuracy_level=accuracy_level, progress=False)
    qcompile.export_onnx(build("llama"), tmp_path / "m", recipe, [example("llama")], **options)
    nodes = [n for n in ir.load(tmp_path / "m/model.onnx").graph.all_nodes() if n.op_type == "MatMulNBits"]
    assert nodes and {node.attributes["accuracy_level"].as_int() for node in nodes} == {accuracy_level}


@pytest.mark.parametrize(
    "operator,low_memory,module,names",
    [
        ("DualLinear", False, DECODER, ["decode", "prefill"]),
        ("DualLinear", True, DECODER, ["decode"]),
        ("DualLinear", False, StatelessModule(nn.Identity(), torch.ones(1)), ["prefill"]),
        ("Int8Linear", False, DECODER, ["decode"]),
    ],
)
def test_variants_of_decoders_and_encoders(operator, low_memory, module, names, tmp_path, monkeypatch):
    """A dual-grained decoder has two, unless memory is low; an encoder has prefill only, other models one."""
    text = f"model (float[m, 4] x, float[4] w) => (float[m, 4] y) {{ y = qcompile.{operator} (x, w, w, , w) }}"
    ir.save(graph_of(text, w=np.ones(4, np.float32)), tmp_path / "model.onnx")
    monkeypatch.setattr(variants, "reference", lambda module, keeps_float: keeps_float)
    expected = variants.expected_outputs(tmp_path / "model.onnx", module, low_memory=low_memory)
    assert list(expected.variants) == names
    assert (expected.module in expected.variants.values()) == (len(names) == 1)
    for form, is_dual in (("int4/group32/dual", True), ("int8", False)):
        site = linear(form, "int8", 64)
        kept = {name: keeps_float(site) for name, keeps_float in expected.variants.items()}
        assert kept == {name: name == "decode" and is_dual for name in names}
        assert len(names) == 1 or not expected.module(site)
