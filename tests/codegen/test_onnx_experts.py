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
from torch import nn
from zoo import build, example

import qcompile
from qcompile.analysis.sites import grouped_operands, through_transposes
from qcompile.codegen.onnx.fusions.moe import split_experts
from qcompile.codegen.onnx.ops.matmul_ops import blocks_to_numbers
from qcompile.codegen.onnx.tracing.onnx_linear import NoOnnxForm
from qcompile.generation.onnx_session import Session
from qcompile.ir.capture import capture
from qcompile.pipeline.presets import find_recipe
from qcompile.recipe.rule import Rule

ops = torch.ops.qcompile_onnx


@pytest.mark.parametrize("ends", [[3, 3, 5, 9], [0, 0, 0, 9], [9, 9, 9, 9], [1, 2, 3, 9]])
def test_rows_meet_their_own_expert(ends):
    """Experts without rows too; codes of a ragged last block, with and without zero points."""
    torch.manual_seed(0)
    x, expert = torch.randn(9, 24), [next(e for e, end in enumerate(ends) if row < end) for row in range(9)]
    weights = torch.randn(4, 24, 5)
    found = ops.experts_linear(x, torch.tensor(ends), list(weights))
    assert torch.allclose(found, torch.stack([x[row] @ weights[e] for row, e in enumerate(expert)]), atol=1e-5)
    codes = torch.randint(0, 256, (4, 5, 2, 8), dtype=torch.uint8)
    scales, zeros = torch.rand(4, 5, 2), torch.randint(0, 256, (4, 5, 1), dtype=torch.uint8)
    for each in ([], list(zeros)):
        found = ops.experts_nbits(x, torch.tensor(ends), list(codes), list(scales), each, 24, 4, 16)
        for row, e in enumerate(expert):
            weight = blocks_to_numbers(codes[e], scales[e], each[e] if each else None, 4, 16)[:, :24]
            assert torch.allclose(found[row], weight @ x[row], atol=1e-3)
    codes, zeros = torch.randint(0, 256, (4, 60), dtype=torch.uint8), torch.randint(0, 256, (4, 5), dtype=torch.uint8)
    scales = torch.rand(4, 2, 5)
    found = ops.experts_blocked(x, torch.tensor(ends), list(codes), list(scales), list(zeros), 24, 4, 16)
    for row, e in enumerate(expert):
        want = ops.blocked_linear(x[row], codes[e], scales[e], zeros[e], None, 4, 16)
        assert torch.allclose(found[row], want, atol=1e-4)


@pytest.mark.parametrize(
    "name,recipe,portable",
    [("mixtral", None, False), ("mixtral", None, True), ("mixtral", "w4a16", False), ("qwen2_moe", "w8a16", False),
     ("mixtral", "w4a16", True), ("qwen2_moe", "int4-cpu", False)],
)  # fmt: skip
def test_the_file_generates_the_same(name, recipe, portable, tmp_path):
    model = build(name)
    rounded = recipe == "int4-cpu"  # its activations: what routers then change is small only while all is small
    with torch.no_grad():
        for parameter in model.parameters():  # what layers add must outweigh the token, and routers differ
            if not rounded and parameter.ndim > 1 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(5)
    if recipe:
        qcompile.quantize(model, recipe, [example(name)], progress=False)
    level = {} if portable else {"accuracy_level": 1}
    report = qcompile.export_onnx(model, tmp_path / "m", contrib_ops=not portable, progress=False, **level)
    assert report.numbers["onnx relative error"] < (0.05 if rounded else 1e-5)
    assert any("4 products of experts" in note for part in report.passes for note in part.notes)
    if rounded:
        return
    ids = torch.tensor([[5, 9, 17, 33]])
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    assert len(set(want)) > 2
    assert list(Session(tmp_path / "m").stream(ids, 12)) == want
    counts = collections.Counter(node.op_type for node in onnx.load(tmp_path / "m/model.onnx").graph.node)
    experts = 2 * 2 * model.config.num_experts if name == "qwen2_moe" else 2 * 2 * model.config.num_local_experts
    assert counts["MatMul" if recipe is None or portable else "MatMulNBits"] >= experts
    assert (counts["DequantizeLinear"] >= experts) == (portable and recipe is not None)


def test_of_a_model_in_bfloat16_at_the_level_that_is_shipped(tmp_path):
    """Experts alone are quantized: a file of codes is no float one."""
    model = build("mixtral").bfloat16()
    rules = tuple(Rule(name, keep=True) for name in ("*self_attn*", "*lm_head*"))
    recipe = dataclasses.replace(find_recipe("w4a16"), rules=rules)
    qcompile.quantize(model, recipe, [example("mixtral")], progress=False)
    report = qcompile.export_onnx(model, tmp_path / "m", progress=False)
    assert report.numbers["onnx relative error"] < 1e-5
    assert 1e-4 < report.numbers["onnx relative error as run"] < 0.05  # activations rounded to int8 in blocks
    assert json.loads((tmp_path / "m/qcompile.json").read_text())["recipe"] != "float"


def test_it_runs_in_onnxruntime_genai(tmp_path):
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
    with pytest.raises(NoOnnxForm, match="quantized stacks of experts are read by .*set_experts_implementation"):
        qcompile.export_onnx(model, tmp_path / "m", progress=False)
    assert os.listdir(tmp_path) == []


class Grouped(nn.Module):
    """A grouped product of as many rows for each expert: it has no ends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 16, dtype=torch.bfloat16))

    def forward(self, x):
        return torch.ops.aten._grouped_mm(x, self.weight)


def test_products_without_ends_are_others():
    program = capture(Grouped(), (torch.randn(2, 4, 16, dtype=torch.bfloat16),), {})
    node = next(n for n in program.graph.nodes if "grouped_mm" in str(n.target))
    assert grouped_operands(node) is None
    with pytest.raises(NoOnnxForm, match="multiplied as .rows .T, K., stack .E, K, N., ends .E.. only"):
        split_experts(program)


@pytest.mark.parametrize(
    "turn,turns",
    [(lambda w: w.transpose(-1, -2), 1), (lambda w: w.permute(0, 2, 1), 1),
     (lambda w: w.transpose(1, 2).transpose(1, 2), 2), (lambda w: w.permute(1, 0, 2), 0),
     (lambda w: w.transpose(0, 1), 0)],
)  # fmt: skip
def test_only_the_last_two_axes_are_turned(turn, turns):
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 4))

        def forward(self, x):
            return x @ turn(self.weight)

    program = capture(Turn(), (torch.randn(4, 3, 4),), {})
    product = next(n for n in program.graph.nodes if n.op == "call_function" and "matmul" in str(n.target))
    source, found = through_transposes(product.args[1])
    assert found == turns and (program.weight_name(source) == "weight") == (turns > 0)
