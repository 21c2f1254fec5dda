"""4-bit and 8-bit weights by codes: MatMulNBits, and the standard operators that mean the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_nodes import graph_of, open_session, operators_of, run

from qcompile.codegen.onnx.lowering.lower_graph import lower

K, N, BLOCK = 64, 24, 32


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8, two 4-bit values a byte, the first in the low bits."""
    flat = values.reshape(-1)
    return (flat if bits == 8 else flat[::2] | flat[1::2] << 4).astype(np.uint8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_standard_operators_multiply_by_dequantized_codes(bits, bias, tmp_path):
    """And ONNX Runtime makes one MatMulNBits of them."""
    rng = np.random.default_rng(0)
    q, z = rng.integers(0, 2**bits, (K, N)), rng.integers(0, 2**bits, (K // BLOCK, N))
    scales, b = rng.uniform(0.5, 2, (K // BLOCK, N)).astype(np.float32), rng.normal(size=N).astype(np.float32)
    text = f"""
        model (float[m, {K}] x) => (float[m, {N}] y) {{
            y = qcompile.BlockedLinear <K = {K}, bits = {bits}, block_size = {BLOCK}> (
                x, codes, scales, zeros{", b" if bias else ""})
        }}"""
    model = graph_of(text, codes=pack(q, bits), scales=scales, zeros=pack(z, bits), b=b)
    lowered = lower(model, "decode", contrib_ops=False)
    assert operators_of(lowered) == {"DequantizeLinear": 1, "MatMul": 1} | ({"Add": 1} if bias else {})
    x = rng.normal(size=(3, K)).astype(np.float32)
    weight = (q - np.repeat(z, BLOCK, 0)) * np.repeat(scales, BLOCK, 0)
    got = open_session(lowered, written=str(tmp_path / "opened.onnx")).run(None, {"x": x})[0]
    assert np.allclose(got, x @ weight + b * bias, rtol=1e-2, atol=0.02 * np.abs(got).max())
    assert "MatMulNBits" in {node.op_type for node in onnx.load(tmp_path / "opened.onnx").graph.node}


@pytest.mark.parametrize("bias", [True, False])
def test_decode_multiplies_by_codes_without_rounding(bias):
    rng = np.random.default_rng(0)
    q, s1, row = rng.integers(0, 16, (N, K)), rng.integers(1, 8, (N, K // BLOCK)), rng.uniform(0.5, 2, N)
    text = f"""
        model (float[m, {K}] x) => (float[m, {N}] y) {{
            y = qcompile.DualLinear <K = {K}, N = {N}, bits = 4, block_size = {BLOCK}, per_row = 1> (
                x, codes, scales, , row{", b" if bias else ""})
        }}"""
    scales, b = (s1 * row[:, None]).astype(np.float32), rng.normal(size=N).astype(np.float32)
    codes = pack(q, 4).reshape(N, K // BLOCK, BLOCK // 2)
    lowered = lower(graph_of(text, codes=codes, scales=scales, row=row.astype(np.float32), b=b), "decode")
    (node,) = lowered.graph
    assert node.op_type == "MatMulNBits" and len(node.inputs) == (6 if bias else 3)
    assert "row" not in lowered.graph.initializers, "nobody reads it"
    x = rng.normal(size=(3, K)).astype(np.float32)
    weight = (q - 8) * np.repeat(scales, BLOCK, 1)
    assert np.allclose(run(lowered, x)[0], x @ weight.T + b * bias, rtol=1e-4, atol=1e-3)
