"""int8 matmuls written as nodes of ONNX Runtime, without a model around them: integers at the ends of their range."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_nodes import graph_of, open_session, run, without_dot_products

import qcompile.codegen.onnx.ops  # noqa: F401  registers torch.ops.qcompile_onnx
from qcompile.codegen.onnx.lowering.lower_graph import lower
from qcompile.codegen.onnx.lowering.matmul_integer import EXACT, for_inexact_processors
from qcompile.numerics.int8_matmul import processor


def in_file(weight: np.ndarray, contrib_ops: bool) -> np.ndarray:
    """An int8 weight as a file holds it."""
    return weight.astype(np.int8) if contrib_ops else (weight + 128).astype(np.uint8)


def int8_linear(rng: np.random.Generator, contrib_ops: bool = True) -> tuple[ir.Model, np.ndarray]:
    """A graph with one Int8Linear, and its weight [96, 24]: the largest integers of either sign."""
    weight = rng.choice([-128, -127, 127], (96, 24))
    text = f"""
        model (float[m, 96] x, {"int8" if contrib_ops else "uint8"}[96, 24] w, float[24] s) => (float[m, 24] y) {{
            y = qcompile.Int8Linear <per_row = 1> (x, w, s)
        }}"""
    return graph_of(text, w=in_file(weight, contrib_ops), s=np.ones(24, np.float32)), weight


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("kind", ["asks the processor", "without dot products", "standard operators"])
def test_the_largest_integers_do_not_overflow(rows, kind):
    """Pairs of products of u8 and s8 overflow 16 bits on processors without 8-bit dot products; ours must not."""
    rng, contrib_ops = np.random.default_rng(0), kind != "standard operators"
    model, weight = int8_linear(rng, contrib_ops)
    lowered = lower(model, "prefill", contrib_ops=contrib_ops)
    if kind == "without dot products":
        without_dot_products(lowered)
    x = rng.choice([-127.0, 127.0, 127.0], (rows, 96)).astype(np.float32)
    assert np.array_equal(run(lowered, x)[0], x @ weight.astype(np.float32))


def test_a_file_that_is_opened_keeps_the_product_that_is_exact_here(tmp_path):
    """Constant folding asks the processor and drops the other branch with its weight; u8 x u8 where it saturates."""
    kinds = {}
    for kind in ("asks the processor", "without dot products"):
        lowered = lower(int8_linear(np.random.default_rng(0))[0], "prefill")
        if kind == "without dot products":
            without_dot_products(lowered)
        open_session(lowered, written=str(tmp_path / "opened.onnx"))
        opened = onnx.load(tmp_path / "opened.onnx").graph
        products = [node for node in opened.node if node.op_type == "MatMulIntegerToFloat"]
        assert len(products) == 1 and not any(node.op_type in ("If", "MatMulInteger", "Cast") for node in opened.node)
        weights = [tensor for tensor in opened.initializer if list(tensor.dims) == [96, 24]]
        assert [tensor.name for tensor in weights] == [products[0].input[1]]
        kinds[kind] = weights[0].data_type
    assert kinds["without dot products"] == onnx.TensorProto.UINT8
    if processor() in ("vnni", "amx"):
        assert kinds["asks the processor"] == onnx.TensorProto.INT8


def test_a_weight_of_standard_operators_stays_as_it_is_stored():
    """On every processor: standard operators, and nothing computed when the file is opened."""
    lowered = lower(int8_linear(np.random.default_rng(0), False)[0], "prefill", contrib_ops=False)
    assert {node.domain for node in lowered.graph} == {""}
    (product,) = [node for node in lowered.graph if node.op_type == "MatMulInteger"]
    (weight,) = [v for v in lowered.graph.initializers.values() if v.const_value.shape == (96, 24)]
    assert product.inputs[1] is weight and weight.const_value.dtype == ir.DataType.UINT8
    assert for_inexact_processors(lowered) is None, "the same for all"


def test_the_copy_for_inexact_processors_takes_the_other_branch():
    """The copy only: the model still asks."""
    model, weight = int8_linear(np.random.default_rng(0))
    lowered = lower(model, "prefill")
    copy = for_inexact_processors(lowered)
    for graph, operator in ((lowered.graph, "Cast"), (copy.graph, "Constant")):
        (choice,) = [node for node in graph if node.op_type == "If"]
        assert choice.inputs[0].name == EXACT and choice.inputs[0].producer().op_type == operator
    x = np.full((2, 96), 127, np.float32)
    assert np.array_equal(run(copy, x)[0], x @ weight.astype(np.float32))


def test_the_processor_is_asked_for_the_true_sum():
    """Whatever the processor at hand gives: a file that expects another sum would take the slower branch everywhere."""
    lowered = lower(int8_linear(np.random.default_rng(0))[0], "prefill")
    (asked,) = [node for node in lowered.graph if node.op_type == "MatMulInteger"]
    (equal,) = asked.outputs[0].consumers()
    codes, weight = (value.const_value.numpy().astype(np.int64) for value in asked.inputs)
    assert equal.op_type == "Equal" and np.all(codes @ weight == int(equal.inputs[1].const_value.numpy()))
    assert codes.min() == 255 and weight.min() == 127, "no larger sums of pairs"


@pytest.mark.parametrize("contrib_ops", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_symmetric_activations(per_row, contrib_ops):
    """Rows of other sizes, and one whose largest value is negative, as the operator's own reference multiplies them."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-127, 128, (96, 24)), rng.uniform(0.5, 2, 24).astype(np.float32)
    text = f"""
        model (float[m, 96] x, {"int8" if contrib_ops else "uint8"}[96, 24] w, float[24] s) => (float[m, 24] y) {{
            y = qcompile.Int8Linear <per_row = {int(per_row)}> (x, w, s)
        }}"""
    weight = dict(w=in_file(codes, contrib_ops), s=scale)
    lowered = lower(graph_of(text, **weight), "prefill", contrib_ops=contrib_ops)
    x = rng.normal(size=(5, 96)).astype(np.float32) * np.array([1, 0.01, 30, 3, 1], np.float32)[:, None]
    x[3, 5], x[4] = -40.0, -np.abs(x[4])
    for part in (x, x[1:2], x[3:4], x[4:5]):
        tensors = (torch.from_numpy(t) for t in (part, *weight.values()))
        want = torch.ops.qcompile_onnx.int8_linear(*tensors, None, None, per_row).numpy()
        assert np.allclose(run(lowered, part)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("contrib_ops", [True, False])
def test_halves_are_rounded_before_the_zero_point_is_added(contrib_ops):
    """To even: round(0.5) + 3 is 3, and round(0.5 + 3) is 4."""
    weight = np.ones((96, 24), np.int64)
    text = f"""
        model (float[m, 96] x, {"int8" if contrib_ops else "uint8"}[96, 24] w, float[24] s, float[24] sums)
            => (float[m, 24] y) {{
            y = qcompile.Int8Linear <per_row = 1> (x, w, s, sums)
        }}"""
    parts = dict(s=np.ones(24, np.float32), sums=np.full(24, 96, np.float32))
    lowered = lower(graph_of(text, w=in_file(weight, contrib_ops), **parts), "prefill", contrib_ops=contrib_ops)
    x = np.full((1, 96), 0.5, np.float32)
    x[0, 0], x[0, 1] = -3, 252  # a scale of one, a zero point of three
    assert np.allclose(run(lowered, x)[0], 249, atol=1e-3)


@pytest.mark.parametrize("contrib_ops", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_activations_with_zero_points(per_row, contrib_ops):
    """Of one sign, of both, of none: the same codes as the operator's own reference makes, and exact sums of them."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-127, 128, (96, 24)), rng.uniform(0.5, 2, 24).astype(np.float32)
    weight_type = "int8" if contrib_ops else "uint8"
    text = f"""
        model (float[m, 96] x, {weight_type}[96, 24] w, float[24] s, float[24] sums, float[24] b) => (float[m, 24] y) {{
            y = qcompile.Int8Linear <per_row = {int(per_row)}> (x, w, s, sums, b)
        }}"""
    weight = dict(w=in_file(codes, contrib_ops), s=scale, sums=(scale * codes.sum(0)).astype(np.float32))
    weight["b"] = rng.normal(size=24).astype(np.float32)
    lowered = lower(graph_of(text, **weight), "prefill", contrib_ops=contrib_ops)
    assert ("sums" in lowered.graph.initializers) == per_row  # the operators take one zero point
    x = rng.normal(size=(7, 96)).astype(np.float32)
    x[1], x[2], x[3], x[4] = np.abs(x[1]), -np.abs(x[2]), 0, x[4] * 1e-12
    for part in (x, x[1:2], x[2:3], x[3:4]):
        tensors = (torch.from_numpy(t) for t in (part, *weight.values()))
        want = torch.ops.qcompile_onnx.int8_linear(*tensors, per_row).numpy()
        assert np.allclose(run(lowered, part)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
