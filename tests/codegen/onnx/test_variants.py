"""Faults in one variant, or in what other processors run, are found before a file is handed over."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_nodes import bend
from zoo import build, example

import qcompile
from qcompile.codegen.onnx import variants
from qcompile.codegen.onnx.lowering import matmul_integer
from qcompile.codegen.onnx.tracing.cached_decoder import CachedDecoder
from qcompile.codegen.onnx.tracing.stateless_module import StatelessModule
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.numerics.int8_matmul import processor

DUAL = "int4-cpu"


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


@pytest.mark.parametrize("accuracy_level", [1, 4])
@pytest.mark.parametrize("recipe", ["w4a16", DUAL])  # one variant, two
def test_the_file_has_the_accuracy_level_that_was_requested(recipe, accuracy_level, tmp_path):
    """In branches too; every variant was verified at level 1."""
    options = dict(accuracy_level=accuracy_level, progress=False)
    qcompile.export_onnx(build("llama"), tmp_path / "m", recipe, [example("llama")], **options)
    nodes = [n for n in ir.load(tmp_path / "m/model.onnx").graph.all_nodes() if n.op_type == "MatMulNBits"]
    assert nodes and {node.attributes["accuracy_level"].as_int() for node in nodes} == {accuracy_level}


def test_variants_of_decoders_and_encoders(tmp_path, monkeypatch):
    """A dual-grained decoder has two, unless memory is low; an encoder has prefill only, other models one."""
    found = {}

    def expect(path, module, **options):
        expected = real(path, module, **options)
        found[len(found)] = type(module), list(expected.variants)
        raise KeyboardInterrupt

    from qcompile.codegen.onnx import export_module

    real = variants.expected_outputs
    monkeypatch.setattr(export_module, "expected_outputs", expect)
    encoder = dict(example=example("bert"))
    cases = [
        ("llama", DUAL, {}),
        ("llama", DUAL, dict(low_memory=True)),
        ("llama", "w4a16", {}),
        ("bert", DUAL, encoder),
    ]
    for index, (name, recipe, options) in enumerate(cases):
        with pytest.raises(KeyboardInterrupt):
            qcompile.export_onnx(build(name), tmp_path / str(index), recipe, [example(name)], progress=False, **options)
    assert list(found.values()) == [
        (CachedDecoder, ["decode", "prefill"]),
        (CachedDecoder, ["decode"]),
        (CachedDecoder, ["decode"]),
        (StatelessModule, ["prefill"]),
    ]
