"""Rows that are sorted by expert meet their own expert."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.onnx.ops.matmul_ops import dequantize_blocks

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
            weight = dequantize_blocks(codes[e], scales[e], each[e] if each else None, 4, 16)[:, :24]
            assert torch.allclose(found[row], weight @ x[row], atol=1e-3)
    codes, zeros = torch.randint(0, 256, (4, 60), dtype=torch.uint8), torch.randint(0, 256, (4, 5), dtype=torch.uint8)
    scales = torch.rand(4, 2, 5)
    found = ops.experts_blocked(x, torch.tensor(ends), list(codes), list(scales), list(zeros), 24, 4, 16)
    for row, e in enumerate(expert):
        want = ops.blocked_linear(x[row], codes[e], scales[e], zeros[e], None, 4, 16)
        assert torch.allclose(found[row], want, atol=1e-4)
