"""Mixtures of experts in exported folders: every expert multiplies its own rows."""

from __future__ import annotations

import collections
import dataclasses
import json
import os

import numpy as np
import onnx
import pytest
import torch
from onnx_models import generated
from torch import nn
from zoo import build, example

import qcompile
from qcompile.analysis.sites import grouped_operands, through_transposes
from qcompile.codegen.onnx.fusions.grouped_matmul import split_grouped_matmuls
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError
from qcompile.generation.onnx_session import Session
from qcompile.ir.capture import capture
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Rule


@pytest.mark.parametrize(
    "name,recipe,contrib_ops",
    [("mixtral", None, True), ("mixtral", None, False), ("mixtral", "w4a16", True), ("qwen2_moe", "w8a16", True),
     ("mixtral", "w4a16", False), ("qwen2_moe", "int4-cpu", True)],
)  # fmt: skip
@pytest.mark.slow
def test_the_file_generates_the_same(name, recipe, contrib_ops, tmp_path):
    model = build(name)
    rounded = recipe == "int4-cpu"  # its activations: what routers then change is small only while all is small
    with torch.no_grad():
        for parameter in model.parameters():  # what layers add must outweigh the token, and routers differ
            if not rounded and parameter.ndim > 1 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(5)
    if recipe:
        qcompile.quantize(model, recipe, [example(name)], progress=False)
    level = {"accuracy_level": 1} if contrib_ops else {}
    report = qcompile.export_onnx(model, tmp_path / "m", contrib_ops=contrib_ops, progress=False, **level)
    assert report.metrics["onnx relative error"] < (0.05 if rounded else 1e-5)
    assert any("4 grouped matmuls" in note for part in report.passes for note in part.notes)
    if rounded:
        return
    ids = torch.tensor([[5, 9, 17, 33]])
    want = generated(model, ids)
    assert len(set(want)) > 2
    assert list(Session(tmp_path / "m").stream(ids, 12)) == want
    counts = collections.Counter(node.op_type for node in onnx.load(tmp_path / "m/model.onnx").graph.node)
    experts = 2 * 2 * model.config.num_experts if name == "qwen2_moe" else 2 * 2 * model.config.num_local_experts
    assert counts["MatMulNBits" if recipe is not None and contrib_ops else "MatMul"] >= experts
    assert (counts["DequantizeLinear"] >= experts) == (not contrib_ops and recipe is not None)


def test_of_a_model_in_bfloat16_at_the_level_that_is_shipped(tmp_path):
    """Experts alone are quantized: a file of codes is no float one."""
    model = build("mixtral").bfloat16()
    rules = tuple(Rule(name, keep=True) for name in ("*self_attn*", "*lm_head*"))
    recipe = dataclasses.replace(find_recipe("w4a16"), rules=rules)
    qcompile.quantize(model, recipe, [example("mixtral")], progress=False)
    report = qcompile.export_onnx(model, tmp_path / "m", progress=False)
    assert report.metrics["onnx relative error"] < 1e-5
    assert 1e-4 < report.metrics["onnx relative error as run"] < 0.05  # activations rounded to int8 in blocks
    assert json.loads((tmp_path / "m/qcompile.json").read_text())["recipe"] != "float"


def test_experts_run_in_onnxruntime_genai(tmp_path):
    import onnxruntime_genai as genai

    model = build("qwen2_moe")
    qcompile.quantize(model, "w4a16", [example("qwen2_moe")], progress=False)
    qcompile.export_onnx(model, tmp_path / "m", accuracy_level=1, progress=False)
    rows = [[5, 9, 17, 33], [90, 8, 51, 70]]
    want = model.generate(torch.tensor(rows), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    parameters = genai.GeneratorParams(folder := genai.Model(str(tmp_path / "m")))
    parameters.set_search_options(max_length=12, min_length=12, batch_size=2)
    generator = genai.Generator(folder, parameters)
    generator.append_tokens(np.array(rows, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert [[int(t) for t in generator.get_sequence(i)] for i in range(2)] == want.tolist()


def test_what_has_no_form_is_refused(tmp_path):
    model = build("mixtral")
    qcompile.quantize(model, "w4a16", [example("mixtral")], progress=False)
    model.set_experts_implementation("batched_mm")  # each token's own weights, gathered from the stack
    words = "quantized stacks of experts are read by .*set_experts_implementation"
    with pytest.raises(OnnxUnsupportedError, match=words):
        qcompile.export_onnx(model, tmp_path / "m", progress=False)
    assert os.listdir(tmp_path) == []


class Grouped(nn.Module):
    """A grouped product with the same number of rows for every expert: it has no ends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 16, dtype=torch.bfloat16))

    def forward(self, x):
        return torch.ops.aten._grouped_mm(x, self.weight)


def test_products_without_ends_are_others():
    program = capture(Grouped(), (torch.randn(2, 4, 16, dtype=torch.bfloat16),), {})
    node = next(n for n in program.graph.nodes if "grouped_mm" in str(n.target))
    assert grouped_operands(node) is None
    words = "multiplied as .rows .T, K., stack .E, K, N., ends .E.. only"
    with pytest.raises(OnnxUnsupportedError, match=words):
        split_grouped_matmuls(program)


@pytest.mark.parametrize(
    "change,transposes",
    [(lambda w: w.transpose(-1, -2), 1), (lambda w: w.permute(0, 2, 1), 1),
     (lambda w: w.transpose(1, 2).transpose(1, 2), 2), (lambda w: w.permute(1, 0, 2), 0),
     (lambda w: w.transpose(0, 1), 0)],
)  # fmt: skip
def test_only_the_last_two_axes_are_transposed(change, transposes):
    class Change(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 4))

        def forward(self, x):
            return x @ change(self.weight)

    program = capture(Change(), (torch.randn(4, 3, 4),), {})
    product = next(n for n in program.graph.nodes if n.op == "call_function" and "matmul" in str(n.target))
    source, found = through_transposes(product.args[1])
    assert found == transposes and (program.weight_name(source) == "weight") == (transposes > 0)
