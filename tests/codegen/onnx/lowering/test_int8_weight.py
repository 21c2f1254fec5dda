"""int8 weights that are computed from 4-bit codes and two levels of scales."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_nodes import graph_of, run, without_dot_products

from qcompile.codegen.onnx.lowering.lower_graph import lower


def test_equal_codes_with_other_scales_are_two_int8_weights():
    """torch.onnx stores equal tensors once, so two weights may share some of theirs."""
    rng = np.random.default_rng(0)
    tensors = dict(codes=rng.integers(0, 256, (32, 2, 16), np.uint8), zeros=rng.integers(0, 256, (32, 1), np.uint8))
    for i, s1 in enumerate((rng.integers(1, 8, (32, 2)), rng.integers(1, 8, (32, 2)))):
        tensors[f"row{i}"] = np.full(32, 0.01 * (i + 1), np.float32)
        tensors[f"scales{i}"] = (s1 * tensors[f"row{i}"][:, None]).astype(np.float32)
    sizes = "K = 64, N = 32, bits = 4, block_size = 32, per_row = 1"
    text = f"""
        model (float[m, 64] x) => (float[m, 32] y0, float[m, 32] y1) {{
            y0 = qcompile.DualLinear <{sizes}> (x, codes, scales0, zeros, row0)
            y1 = qcompile.DualLinear <{sizes}> (x, codes, scales1, zeros, row1)
        }}"""
    model = graph_of(text, **tensors)
    x = rng.integers(-127, 128, (3, 64)).astype(np.float32)
    x[:, 0] = 127  # integers at a scale of one: nothing is rounded
    decode, prefill = run(lower(model, "decode"), x), run(lower(model, "prefill"), x)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-3) for a, b in zip(decode, prefill, strict=True))
    assert not np.allclose(prefill[1], 2 * prefill[0], rtol=0.1)


def test_the_ratio_of_two_scales_is_rounded():
    """3 s / s is less than 3 for one s in fourteen."""
    row = np.linspace(0.01, 0.1, 1000, dtype=np.float32)
    row = row[np.float32(3) * row / row < 3][:16]
    assert len(row) == 16
    scales = np.repeat(np.float32(3) * row[:, None], 2, 1)
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (16, 64))
    text = """
        model (float[m, 64] x) => (float[m, 16] y) {
            y = qcompile.DualLinear <K = 64, N = 16, bits = 4, block_size = 32, per_row = 0> (x, codes, scales, , row)
        }"""
    codes = (q[:, ::2] | q[:, 1::2] << 4).astype(np.uint8).reshape(16, 2, 16)
    x = rng.choice([-127.0, 127.0], (40, 64)).astype(np.float32)
    (found,) = run(lower(graph_of(text, codes=codes, scales=scales, row=row), "prefill"), x)
    assert np.allclose(found, x @ (3 * (q - 8)).T * row, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("k", [64, 80])  # 80: three blocks of 32, the last one ragged, and zero points for four
def test_the_largest_dual_weights(k, zero_points):
    """s1 (q - z) from -120 to 120 in arithmetic of bytes; u8 is made of them where the processor needs it."""
    rng, n, blocks = np.random.default_rng(0), 16, -(-k // 32)
    q, z = rng.choice([0, 15], (n, blocks * 32)), np.zeros((n, blocks + blocks % 2), int)
    z[:, :blocks] = rng.choice([0, 7, 15], (n, blocks))
    s1 = np.full((n, blocks), 8)
    if not zero_points:  # the middle
        z[:], s1 = 8, rng.choice([-15, 4, -3, 15], (n, blocks))
        s1[:, 0] = rng.choice([-15, 15], n)
    text = f"""
        model (float[m, {k}] x) => (float[m, {n}] y) {{
            y = qcompile.DualLinear <K = {k}, N = {n}, bits = 4, block_size = 32, per_row = 0> (
                x, codes, scales, {"zeros" if zero_points else ""}, row)
        }}"""
    row = np.full(n, 0.5, np.float32)
    packed = [(part[:, ::2] | part[:, 1::2] << 4).astype(np.uint8) for part in (q, z)]
    tensors = dict(codes=packed[0].reshape(n, blocks, 16), scales=(s1 * 0.5).astype(np.float32), row=row)
    lowered = lower(graph_of(text, **tensors, **(dict(zeros=packed[1]) if zero_points else {})), "prefill")
    weight = (s1[..., None] * (q.reshape(n, blocks, 32) - z[:, :blocks, None])).reshape(n, -1)[:, :k]
    assert weight.min() == -120 and weight.max() == 120
    x = rng.choice([-127.0, 127.0], (40, k)).astype(np.float32)
    for change in (lambda model: None, without_dot_products):
        change(lowered)
        assert np.array_equal(run(lowered, x)[0], x @ weight.T.astype(np.float32) * 0.5)
