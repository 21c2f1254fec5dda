"""Packed matmuls as several for prefill, from the bytes of one weight."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_nodes import graph_of, open_session, operators, operators_of, run

from qcompile.codegen.onnx.lowering.lower_graph import lower, lower_by_tokens
from qcompile.codegen.onnx.lowering.unpack_matmul import _sizes

K, N, BLOCK = 80, 24, 32  # three blocks, the last one ragged, and zero points for four
BY_CHANNEL = "first, second = Split <axis = -1> (whole, uneven)"


def packed_matmul(rng, split: str, zero_points: bool = True, before: str = "", bias: str = ""):
    """A DualLinear of integers [N, K] and, of its output, a Split; the model and the weight."""
    blocks = -(-K // BLOCK)
    q, s1 = rng.integers(0, 16, (N, blocks * BLOCK)), rng.integers(1, 8, (N, blocks))
    z = rng.integers(0, 16, (N, blocks + blocks % 2)) if zero_points else np.full((N, blocks + blocks % 2), 8)
    row = 2.0 ** rng.integers(-2, 3, N)
    text = f"""
        model (float[b, m, {K}] x) => (float[b, m, c] first, float[b, m, d] second) {{
            whole = qcompile.DualLinear <K = {K}, N = {N}, bits = 4, block_size = {BLOCK}, per_row = 1> (
                x, codes, scales, {"zeros" if zero_points else ""}, row{bias and ", " + bias})
            {before}
            {split}
        }}"""
    codes = (q[:, ::2] | q[:, 1::2] << 4).astype(np.uint8).reshape(N, blocks, BLOCK // 2)
    model = graph_of(
        text,
        row=row.astype(np.float32),
        scales=(s1 * row[:, None]).astype(np.float32),
        uneven=np.array([8, 16]),
        bias=rng.integers(-9, 9, N).astype(np.float32),
        codes=codes,
        zeros=(z[:, ::2] | z[:, 1::2] << 4).astype(np.uint8),
    )
    scales = (s1 * row[:, None])[..., None]
    return model, (scales * (q.reshape(N, blocks, BLOCK) - z[:, :blocks, None])).reshape(N, -1)[:, :K]


def integers(rng: np.random.Generator, rows: int) -> np.ndarray:
    """[1, rows, K] at a scale of one, so that nothing is rounded."""
    x = rng.integers(-127, 128, (1, rows, K)).astype(np.float32)
    x[..., 0] = 127
    return x


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("split", [BY_CHANNEL, "first, second = Split <axis = 2, num_outputs = 2> (whole)"])
def test_prefill_multiplies_part_by_part(split, zero_points, external, tmp_path):
    """Wherever the weights lie: the same values as the matmul and a Split, which is gone."""
    rng = np.random.default_rng(0)
    model, weight = packed_matmul(rng, split, zero_points)
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data" if external else None, size_threshold_bytes=64)
    lowered = lower_by_tokens(ir.load(path), decode_tokens=K)  # x of one row has K values
    ir.save(lowered, path)
    branches = {a.name: operators(a.g.node) for a in onnx.load(path, load_external_data=False).graph.node[-1].attribute}
    assert branches["else_branch"]["MatMulIntegerToFloat"] == 2 and not branches["else_branch"]["Split"]
    assert branches["then_branch"]["MatMulNBits"] == branches["then_branch"]["Split"] == 1
    cut = 8 if "uneven" in split else N // 2
    session = open_session(path)
    for rows in (1, 5):
        x = integers(rng, rows)
        want = np.split(x @ weight.T, [cut], -1)
        for got, right in zip(session.run(None, {"x": x}), want, strict=True):
            assert got.shape == right.shape and np.allclose(got, right, rtol=1e-6, atol=1e-3)


def test_what_all_parts_read_is_quantized_once(tmp_path):
    model, _ = packed_matmul(np.random.default_rng(0), BY_CHANNEL)
    open_session(lower(model, "prefill"), written=str(tmp_path / "opened.onnx"))
    kinds = operators(onnx.load(tmp_path / "opened.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 2 and kinds["QuantizeLinear"] == kinds["ReduceMax"] == 1


STAYS = {
    "it is read whole too": dict(
        before="first = Identity (whole)", split="second, rest = Split <axis = -1> (whole, uneven)"
    ),
    "rows are split": dict(split="first, second = Split <axis = 1, num_outputs = 2> (whole)"),
    "a bias is added": dict(split=BY_CHANNEL, bias="bias"),
}


def test_what_is_an_output_of_the_graph_stays_one_matmul():
    rng = np.random.default_rng(0)
    model, weight = packed_matmul(rng, BY_CHANNEL)
    (split,) = [node for node in model.graph if node.op_type == "Split"]
    model.graph.outputs.append(split.inputs[0])
    lowered = lower(model, "prefill")
    kinds, x = operators_of(lowered), integers(rng, 6)
    assert kinds["Split"] == kinds["MatMulIntegerToFloat"] == 1
    assert np.allclose(run(lowered, x)[2], x @ weight.T, rtol=1e-6, atol=1e-3)


def test_sizes_of_a_split_that_does_not_divide():
    """As ONNX says: all alike but the last, which is smaller."""
    split = ir.node("Split", [ir.val("x")], {"num_outputs": 5}, num_outputs=5)
    assert _sizes(split, 24) == [5, 5, 5, 5, 4] and _sizes(split, 25) == [5] * 5


@pytest.mark.parametrize("why", STAYS)
def test_what_stays_one_matmul(why):
    rng = np.random.default_rng(0)
    model, weight = packed_matmul(rng, **STAYS[why])
    lowered = lower(model, "prefill")
    kinds = operators_of(lowered)
    assert kinds["Split"] == kinds["MatMulIntegerToFloat"] == 1
    x = integers(rng, 6)
    whole = x @ weight.T
    if why == "a bias is added":
        whole += model.graph.initializers["bias"].const_value.numpy()
    if why == "it is read whole too":
        want = [whole, whole[..., :8]]
    else:
        want = np.split(whole, 2, 1) if why == "rows are split" else np.split(whole, [8], -1)
    for got, right in zip(run(lowered, x), want, strict=True):
        assert np.allclose(got, right, rtol=1e-6, atol=1e-3)
