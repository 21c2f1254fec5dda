"""Products written as nodes of ONNX Runtime, without a model around them: integers at the ends of their range."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch

import qcompile.codegen.onnx.ops.matmul_ops  # noqa: F401  registers torch.ops.qcompile_onnx
from qcompile.codegen.onnx.lowering.matmul_nbits import by_tokens, one_way
from qcompile.numerics.int8_matmul import processor


def test_equal_codes_with_other_scales_are_two_int8_weights():
    """torch.onnx stores equal tensors once, so two weights may share some of theirs."""
    rng = np.random.default_rng(0)
    tensors = dict(codes=rng.integers(0, 256, (32, 2, 16), np.uint8), zeros=rng.integers(0, 256, (32, 1), np.uint8))
    for index, levels in enumerate((rng.integers(1, 8, (32, 2)), rng.integers(1, 8, (32, 2)))):
        tensors[f"row{index}"] = np.full(32, 0.01 * (index + 1), np.float32)
        tensors[f"scales{index}"] = (levels * tensors[f"row{index}"][:, None]).astype(np.float32)
    sizes = dict(domain="qcompile", K=64, N=32, bits=4, block_size=32, per_row=1)
    nodes = [
        onnx.helper.make_node(
            "DualLinear", ["x", "codes", f"scales{i}", "zeros", f"row{i}"], [f"y{i}"], f"n{i}", **sizes
        )
        for i in (0, 1)
    ]
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["m", k])
        for n, k in (("x", 64), ("y0", 32), ("y1", 32))
    ]
    graph = onnx.helper.make_graph(
        nodes, "g", values[:1], values[1:], [onnx.numpy_helper.from_array(t, n) for n, t in tensors.items()]
    )
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    x = rng.integers(-127, 128, (3, 64)).astype(np.float32)
    x[:, 0] = 127  # whole numbers in steps of one: nothing is rounded
    few, many = (
        onnxruntime.InferenceSession(one_way(model, way).SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": x}
        )
        for way in ("few", "many")
    )
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-3) for a, b in zip(few, many, strict=True))
    assert not np.allclose(many[1], 2 * many[0], rtol=0.1)


def stored(weight: np.ndarray, portable: bool) -> np.ndarray:
    """An int8 weight as a file holds it."""
    return (weight + 128).astype(np.uint8) if portable else weight.astype(np.int8)


def int8_product(rng: np.random.Generator, portable: bool = False) -> tuple[onnx.ModelProto, np.ndarray]:
    """A graph with one Int8Linear, and its weight [96, 24]: the largest numbers of either sign."""
    weight = rng.choice([-128, -127, 127], (96, 24))
    kind = "uint8" if portable else "int8"
    text = f"""
        <ir_version: 10, opset_import: ["" : 21, "qcompile" : 1, "com.microsoft" : 1]>
        model (float[m, 96] x, {kind}[96, 24] w, float[24] s) => (float[m, 24] y) {{
            y = qcompile.Int8Linear <per_row = 1> (x, w, s)
        }}"""
    model = onnx.parser.parse_model(text)
    for name, value in (("w", stored(weight, portable)), ("s", np.ones(24, np.float32))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    del model.graph.input[1:]
    return model, weight


def without_dot_products(model: onnx.ModelProto) -> None:
    """Make the product that asks the processor come out wrong, as it does where sums of u8 x s8 saturate."""
    question = next(node for node in model.graph.node if node.op_type == "MatMulInteger")
    largest, other = (next(t for t in model.graph.initializer if t.name == name) for name in question.input)
    pair = 2 * int(onnx.numpy_helper.to_array(largest).max()) * int(onnx.numpy_helper.to_array(other).max())
    assert pair > np.iinfo(np.int16).max, "or no processor gets it wrong"
    largest.CopyFrom(onnx.numpy_helper.from_array(np.full((4, 64), 254, np.uint8), largest.name))


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("how", ["asked", "without dot products", "portable"])
def test_the_largest_integers_do_not_overflow(rows, how):
    """Pairs of products of u8 and s8 overflow 16 bits on processors without 8-bit dot products; ours must not."""
    rng = np.random.default_rng(0)
    model, weight = int8_product(rng, how == "portable")
    whole = one_way(model, "many", how == "portable")
    if how == "without dot products":
        without_dot_products(whole)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.choice([-127.0, 127.0, 127.0], (rows, 96)).astype(np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], x @ weight.astype(np.float32))


def test_a_file_that_is_opened_keeps_the_product_that_is_exact_here(tmp_path):
    """Constant folding asks the processor and drops the other branch with its weight; u8 x u8 where it saturates."""
    kinds = {}
    for how in ("asked", "without dot products"):
        whole = one_way(int8_product(np.random.default_rng(0))[0], "many")
        if how != "asked":
            without_dot_products(whole)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "opened.onnx")
        onnxruntime.InferenceSession(whole.SerializeToString(), options, ["CPUExecutionProvider"])
        opened = onnx.load(tmp_path / "opened.onnx").graph
        products = [node for node in opened.node if node.op_type == "MatMulIntegerToFloat"]
        assert len(products) == 1 and not any(node.op_type in ("If", "MatMulInteger", "Cast") for node in opened.node)
        weights = [tensor for tensor in opened.initializer if list(tensor.dims) == [96, 24]]
        assert [tensor.name for tensor in weights] == [products[0].input[1]]
        kinds[how] = weights[0].data_type
    assert kinds["without dot products"] == onnx.TensorProto.UINT8
    if processor() in ("vnni", "amx"):
        assert kinds["asked"] == onnx.TensorProto.INT8


def test_a_portable_weight_stays_as_it_is_stored():
    """On every processor: standard operators, and nothing computed when the file is opened."""
    whole = one_way(int8_product(np.random.default_rng(0), True)[0], "many", portable=True)
    assert {node.domain for node in whole.graph.node} == {""}
    (product,) = [node for node in whole.graph.node if node.op_type == "MatMulInteger"]
    (weight,) = [tensor for tensor in whole.graph.initializer if list(tensor.dims) == [96, 24]]
    assert product.input[1] == weight.name and weight.data_type == onnx.TensorProto.UINT8


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("per_row", [True, False])
def test_activations_with_zero_points(per_row, portable):
    """Of one sign, of both, of none: the same codes as the operator's own reference makes, and exact sums of them."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-127, 128, (96, 24)), rng.uniform(0.5, 2, 24).astype(np.float32)
    kind = "uint8" if portable else "int8"
    text = f"""
        <ir_version: 10, opset_import: ["" : 21, "qcompile" : 1, "com.microsoft" : 1]>
        model (float[m, 96] x, {kind}[96, 24] w, float[24] s, float[24] sums, float[24] b) => (float[m, 24] y) {{
            y = qcompile.Int8Linear <per_row = {int(per_row)}> (x, w, s, sums, b)
        }}"""
    model = onnx.parser.parse_model(text)
    del model.graph.input[1:]
    weight = dict(w=stored(codes, portable), s=scale, sums=(scale * codes.sum(0)).astype(np.float32))
    weight["b"] = rng.normal(size=24).astype(np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weight.items())
    whole = one_way(model, "many", portable)
    assert ("sums" in {t.name for t in whole.graph.initializer}) == per_row  # the operators take one zero point
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.normal(size=(7, 96)).astype(np.float32)
    x[1], x[2], x[3], x[4] = np.abs(x[1]), -np.abs(x[2]), 0, x[4] * 1e-12
    for part in (x, x[1:2], x[2:3], x[3:4]):
        tensors = (torch.from_numpy(t) for t in (part, *weight.values()))
        want = torch.ops.qcompile_onnx.int8_linear(*tensors, per_row).numpy()
        assert np.allclose(session.run(None, {"x": part})[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("k", [64, 80])  # 80: three blocks of 32, the last one ragged, and zero points for four
def test_the_largest_dual_weights(k, zero_points):
    """s1 (q - z) from -120 to 120 in arithmetic of bytes; u8 is made of them where the processor wants it."""
    rng, n, blocks = np.random.default_rng(0), 16, -(-k // 32)
    q, z = rng.choice([0, 15], (n, blocks * 32)), np.zeros((n, blocks + blocks % 2), int)
    z[:, :blocks] = rng.choice([0, 7, 15], (n, blocks))
    s1 = np.full((n, blocks), 8)
    if not zero_points:  # the middle
        z[:], s1 = 8, rng.choice([-15, 4, -3, 15], (n, blocks))
        s1[:, 0] = rng.choice([-15, 15], n)
    inputs = f"x, codes, scales, {'zeros' if zero_points else ''}, row"
    text = f"""
        <ir_version: 10, opset_import: ["" : 21, "qcompile" : 1, "com.microsoft" : 1]>
        model (float[m, {k}] x) => (float[m, {n}] y) {{
            y = qcompile.DualLinear <K = {k}, N = {n}, bits = 4, block_size = 32, per_row = 0> (
                {inputs})
        }}"""
    model, row = onnx.parser.parse_model(text), np.full(n, 0.5, np.float32)
    packed = [(part[:, ::2] | part[:, 1::2] << 4).astype(np.uint8) for part in (q, z)]
    tensors = dict(codes=packed[0].reshape(n, blocks, 16), scales=(s1 * 0.5).astype(np.float32), row=row) | (
        dict(zeros=packed[1]) if zero_points else {}
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in tensors.items())
    weight = (s1[..., None] * (q.reshape(n, blocks, 32) - z[:, :blocks, None])).reshape(n, -1)[:, :k]
    assert weight.min() == -120 and weight.max() == 120
    x, whole = rng.choice([-127.0, 127.0], (40, k)).astype(np.float32), one_way(model, "many")
    for change in (lambda model: None, without_dot_products):
        change(whole)
        session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(None, {"x": x})[0], x @ weight.T.astype(np.float32) * 0.5)


def test_nested_graphs_read_values_of_the_branch_around_them():
    """An If of the model's own inside the If on the number of tokens."""
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        model (float[n] x) => (float[n] y) {
            flag = Constant <value = bool {1}> ()
            doubled = Add (x, x)
            y = If (flag) <then_branch = inner () => (float[n] a) { a = Add (doubled, x) },
                           else_branch = other () => (float[n] b) { b = Neg (doubled) }>
        }"""
    whole = by_tokens(onnx.parser.parse_model(text))
    onnx.checker.check_model(whole, full_check=True)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    for length in (2, 9):
        assert session.run(None, {"x": np.ones(length, np.float32)})[0].tolist() == [3.0] * length
