"""Files of standard operators, in ONNX Runtime and elsewhere."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.ops.translate import translation_table
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError

DUAL = "int4-cpu"


def test_every_operator_has_a_translation():
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qcompile_onnx::")}
    assert {target.name() for target in translation_table(contrib_ops=True)} == ours
    assert set(translation_table(contrib_ops=False)) < set(translation_table(contrib_ops=True))


@pytest.mark.parametrize(
    "name,recipe",
    [
        ("bert", "w4a16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("llama", "int8"), ("llama", DUAL), ("gpt2", "w8a16"), ("gemma2", "w4a16"), ("bert", DUAL))
        ),
    ],
)
def test_a_file_of_standard_operators(name, recipe, tmp_path):
    batch = example(name)
    options = dict(example=batch) if name == "bert" else {}
    report = qcompile.export_onnx(
        build(name), tmp_path / "m", recipe, [batch], contrib_ops=False, progress=False, **options
    )
    path = str(tmp_path / "m/model.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {""} and not model.functions
    assert report.metrics["onnx relative error"] < 1e-5
    if recipe != "int8":  # ONNX Runtime makes its own operator of them: as fast as ours
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        fused = collections.Counter(n.op_type for n in optimized.graph.node)
        assert fused["MatMulNBits"] == sum(n.op_type == "DequantizeLinear" for n in model.graph.node) > 0


@pytest.mark.slow
def test_standard_operators_in_another_runtime(tmp_path):
    """ONNX's own reference evaluator knows nothing but the standard."""
    model = build("llama")
    qcompile.quantize(model, "w4a16", progress=False)
    qcompile.export_onnx(model, tmp_path / "m", contrib_ops=False, progress=False)
    ids = torch.tensor([[5, 9, 17, 33], [90, 8, 51, 70]])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 4), np.int64)}
    feeds |= {
        f"past_key_values.{i}.{part}": np.zeros((2, 2, 0, 16), np.float32) for i in (0, 1) for part in ("key", "value")
    }
    logits = ReferenceEvaluator(str(tmp_path / "m/model.onnx")).run(["logits"], feeds)[0]
    assert torch.allclose(torch.from_numpy(logits), model(ids).logits, atol=1e-4)


def test_float_zero_points_have_no_standard_operators(tmp_path):
    with pytest.raises(OnnxUnsupportedError, match="integer zero points"):
        qcompile.export_onnx(build("llama"), tmp_path / "m", "w4a16-hqq", contrib_ops=False, progress=False)
