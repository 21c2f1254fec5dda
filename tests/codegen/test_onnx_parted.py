"""Products whose channels part again: two products for many rows, from the bytes of one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx_nodes import operators

from qcompile.codegen.onnx.lowering.matmul_nbits import by_tokens, one_way

K, N, BLOCK = 80, 24, 32  # three blocks, the last one ragged, and zero points for four
BY_CHANNEL = "first, second = Split <axis = -1> (whole, uneven)"


def joined(rng: np.random.Generator, split: str, zero_points: bool = True, before: str = "", bias: str = ""):
    """A DualLinear of whole numbers [N, K] and, of what it makes, a Split; the model and the weight."""
    blocks = -(-K // BLOCK)
    q, s1 = rng.integers(0, 16, (N, blocks * BLOCK)), rng.integers(1, 8, (N, blocks))
    z = rng.integers(0, 16, (N, blocks + blocks % 2)) if zero_points else np.full((N, blocks + blocks % 2), 8)
    row = 2.0 ** rng.integers(-2, 3, N)
    text = f"""
        <ir_version: 10, opset_import: ["" : 21, "qcompile" : 1, "com.microsoft" : 1]>
        model (float[b, m, {K}] x) => (float[b, m, c] first, float[b, m, d] second) {{
            whole = qcompile.DualLinear <K = {K}, N = {N}, bits = 4, block_size = {BLOCK}, per_row = 1> (
                x, codes, scales, {"zeros" if zero_points else ""}, row{bias and ", " + bias})
            {before}
            {split}
        }}"""
    model = onnx.parser.parse_model(text)
    tensors = dict(row=row.astype(np.float32), scales=(s1 * row[:, None]).astype(np.float32))
    tensors |= dict(uneven=np.array([8, 16]), bias=rng.integers(-9, 9, N).astype(np.float32))
    codes = (q[:, ::2] | q[:, 1::2] << 4).astype(np.uint8).reshape(N, blocks, BLOCK // 2)
    tensors |= dict(codes=codes, zeros=(z[:, ::2] | z[:, 1::2] << 4).astype(np.uint8))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in tensors.items())
    steps = (s1 * row[:, None])[..., None]
    return model, (steps * (q.reshape(N, blocks, BLOCK) - z[:, :blocks, None])).reshape(N, -1)[:, :K]


def whole_numbers(rng: np.random.Generator, rows: int) -> np.ndarray:
    """[1, rows, K] in steps of one, so that nothing is rounded."""
    x = rng.integers(-127, 128, (1, rows, K)).astype(np.float32)
    x[..., 0] = 127
    return x


def outputs(path: str | bytes, x: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize(
    "split",
    [BY_CHANNEL, "first, second = Split <axis = 2, num_outputs = 2> (whole)"],
)
def test_many_rows_are_multiplied_part_by_part(split, zero_points, external, tmp_path):
    """Wherever the weights lie: the same numbers as the product and a Split, of which nothing is left."""
    rng = np.random.default_rng(0)
    model, weight = joined(rng, split, zero_points)
    path = str(tmp_path / "model.onnx")
    onnx.save(model, path, save_as_external_data=external, size_threshold=64)
    found = by_tokens(onnx.load(path, load_external_data=False), few=K)  # x of one row has K numbers
    onnx.save(found, path)
    branches = {a.name: operators(a.g.node) for a in found.graph.node[-1].attribute}
    assert branches["else_branch"]["MatMulIntegerToFloat"] == 2 and not branches["else_branch"]["Split"]
    assert branches["then_branch"]["MatMulNBits"] == branches["then_branch"]["Split"] == 1
    cut = 8 if "uneven" in split else N // 2
    for rows in (1, 5):
        x = whole_numbers(rng, rows)
        want = np.split(x @ weight.T, [cut], -1)
        for got, right in zip(outputs(path, x), want, strict=True):
            assert got.shape == right.shape and np.allclose(got, right, rtol=1e-6, atol=1e-3)


def test_what_all_parts_read_is_rounded_once(tmp_path):
    model, _ = joined(np.random.default_rng(0), BY_CHANNEL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(one_way(model, "many").SerializeToString(), options, ["CPUExecutionProvider"])
    kinds = operators(onnx.load(tmp_path / "opened.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 2 and kinds["QuantizeLinear"] == kinds["ReduceMax"] == 1


STAYS = {
    "it is read whole too": dict(
        before="first = Identity (whole)", split="second, rest = Split <axis = -1> (whole, uneven)"
    ),
    "rows are split": dict(split="first, second = Split <axis = 1, num_outputs = 2> (whole)"),
    "a bias is added": dict(split=BY_CHANNEL, bias="bias"),
}


@pytest.mark.parametrize("why", STAYS)
def test_what_stays_one_product(why):
    rng = np.random.default_rng(0)
    model, weight = joined(rng, **STAYS[why])
    found = one_way(model, "many")
    kinds = operators(found.graph.node)
    assert kinds["Split"] == kinds["MatMulIntegerToFloat"] == 1
    x = whole_numbers(rng, 6)
    whole = x @ weight.T
    if why == "a bias is added":
        whole += onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "bias"))
    if why == "it is read whole too":
        want = [whole, whole[..., :8]]
    else:
        want = np.split(whole, 2, 1) if why == "rows are split" else np.split(whole, [8], -1)
    for got, right in zip(outputs(found.SerializeToString(), x), want, strict=True):
        assert np.allclose(got, right, rtol=1e-6, atol=1e-3)
