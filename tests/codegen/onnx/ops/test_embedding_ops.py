"""Rows of a quantized table are the rows of the dequantized one."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.onnx.ops.embedding_ops import gather_nbits
from qcompile.codegen.onnx.ops.matmul_ops import dequantize_blocks


@pytest.mark.parametrize("has_zeros", [False, True])
def test_rows_of_the_dequantized_table(has_zeros):
    torch.manual_seed(0)
    codes, scales = torch.randint(0, 256, (7, 2, 8), dtype=torch.uint8), torch.rand(7, 2)
    zeros = torch.randint(0, 256, (7, 1), dtype=torch.uint8) if has_zeros else None
    ids = torch.tensor([[0, 6, 3], [3, 3, 1]])
    table = dequantize_blocks(codes, scales, zeros, 4, 16)[:, :24]
    assert torch.equal(gather_nbits(ids, codes, scales, zeros, 24, 4, 16), table[ids])
