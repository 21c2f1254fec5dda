from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_nodes import graph_of, run

from qcompile.codegen.onnx.lowering.compact_scales import compact_scales
from qcompile.codegen.onnx.lowering.lower_graph import lower

N, K = 8, 64


def two_linears(scales: np.ndarray, row: np.ndarray) -> ir.Model:
    """Two matmuls, and all they read."""
    sizes = f"K = {K}, N = {N}, bits = 4, block_size = 32, per_row = 1"
    text = f"""
        model (float[m, {K}] x) => (float[m, {N}] y, float[m, {N}] z) {{
            y = qcompile.DualLinear <{sizes}> (x, codes, scales, , row)
            z = qcompile.DualLinear <{sizes}> (x, others, scales, , row)
        }}"""
    rng = np.random.default_rng(0)
    codes = {name: rng.integers(0, 256, (N, K // 32, 16), np.uint8) for name in ("codes", "others")}
    return graph_of(text, **codes, scales=scales, row=row)


def test_scales_are_bytes_per_group_and_the_same_values():
    """For both that read them, exactly: they are computed once, by nodes."""
    rng = np.random.default_rng(0)
    row = rng.uniform(0.1, 1, N).astype(np.float32)
    s1 = rng.integers(-15, 16, (N, K // 32)).astype(np.float32)
    model = two_linears(s1 * row[:, None], row)
    x = rng.normal(size=(3, K)).astype(np.float32)
    want = run(lower(model, "decode"), x)
    compact_scales(model)
    stored = [
        value.const_value for value in model.graph.initializers.values() if value.const_value.shape == (N, K // 32)
    ]
    assert [tensor.dtype for tensor in stored] == [ir.DataType.INT8]
    assert [node.op_type for node in model.graph].count("Mul") == 1
    for got, right in zip(run(lower(model, "decode"), x), want, strict=True):
        assert np.array_equal(got, right)


def test_scales_that_are_no_multiples_are_refused():
    scales = np.full((N, K // 32), 0.3, np.float32)
    with pytest.raises(ValueError, match="scales: scales are not whole multiples of their row's scale"):
        compact_scales(two_linears(scales, np.full(N, 0.2, np.float32)))
