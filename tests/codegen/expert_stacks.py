"""Random stacks of expert weights for gemm_experts, rows for them, and the product in float64."""

from __future__ import annotations

import torch
from kernel_cases import DEVICE, randn

from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.experts import prepare_experts
from qcompile.codegen.triton.launch.gemm import PackedWeight
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

FORMS = ["int4/group128/zero", "int4/group64", "int4/group32/zero", "int8/row", "int4/row/zero", "int3/group64/zero",
         "int2/group64/zero", "int4/group64/floatzero", "int4/group128/zero/dual"]  # fmt: skip


def expert_stack(form, experts, n, k, dtype=torch.float16, seed=1):
    """A stack for gemm_experts, and its dequantized values [E, N, K] in float64."""
    q = quantize_tensor(randn(experts, n, k, seed=seed).cpu(), Format.parse(form))
    parts = prepare_experts(*(None if t is None else t.to(DEVICE) for t in q.stored_parts), q.format, k, dtype)
    return PackedWeight(*parts, layout_of(q.format), k), q.dequantize(torch.float64).to(DEVICE)


def expert_product(x, ends, values):
    """Rows of x [S, K] by the weights of their experts, float64 [S, N]; zeros behind the last end."""
    out = torch.zeros(len(x), values.shape[1], dtype=torch.float64, device=x.device)
    first = 0
    for expert, last in enumerate(ends.tolist()):
        out[first:last] = x[first:last].double() @ values[expert].t()
        first = last
    return out


def ends_of(counts, dtype=torch.int32):
    return torch.tensor(counts).cumsum(0).to(dtype).to(DEVICE)
