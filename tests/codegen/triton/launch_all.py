"""Every launch of launch/ for the sizes that the JIT specializes, on a driver without a GPU; prints what was launched.

python launch_all.py ARCHITECTURE
"""

from __future__ import annotations

import json
import sys

import fake_driver
import torch

fake = fake_driver.install(int(sys.argv[1]))

from qcompile.codegen.triton.kernels.group_layout import group_layout_of  # noqa: E402
from qcompile.codegen.triton.kernels.kernel_support import has_format  # noqa: E402
from qcompile.codegen.triton.kernels.spec import RowQuant  # noqa: E402
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of  # noqa: E402
from qcompile.codegen.triton.kernels.weight_layout import layout_of  # noqa: E402
from qcompile.codegen.triton.launch.experts import linear_experts, prepare_experts  # noqa: E402
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight, dequantize, linear_a8, linear_w  # noqa: E402
from qcompile.codegen.triton.launch.group_gemm import GroupWeight, linear_group, prepare_group  # noqa: E402
from qcompile.codegen.triton.launch.pack_weights import prepare  # noqa: E402
from qcompile.codegen.triton.launch.quantized_experts import (  # noqa: E402
    plan_experts_a8,
    plan_experts_w4a8,
    prepare_experts_w4a8,
)
from qcompile.codegen.triton.launch.row_quant import row_quant  # noqa: E402
from qcompile.numerics.format import Format  # noqa: E402
from qcompile.numerics.rounding import quantize_tensor  # noqa: E402

CAPABILITY = divmod(fake.architecture, 10)
ROWS = (1, 2, 16, 33, 128)
N, K = 256, 512
FORMATS = ("int4/group128/zero", "int4/group64/floatzero", "int4/row", "int8/row", "int3/group128", "int2/group64/zero")


def weight_only():
    for text in FORMATS:
        form = Format.parse(text)
        q = quantize_tensor(torch.randn(N, K), form)
        weight = PackedWeight(*prepare(*q.stored_parts, form, K, torch.bfloat16), layout_of(form), K)
        for m in ROWS:
            linear_w(torch.randn(m, K).bfloat16(), weight, Epilogue(), variant="kernel")
        dequantize(weight, torch.bfloat16)


def eight_bit():
    for codes, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        if not has_format(codes, CAPABILITY):
            continue
        weight, scale = torch.ones(N, K).to(dtype), torch.rand(N, 1)
        for m in ROWS:
            for scales in {m, 1}:
                residual = torch.randn(m, N).bfloat16()
                for epilogue in (Epilogue(), Epilogue(residual[0], residual)):
                    x, x_scale = torch.ones(m, K).to(dtype), torch.rand(scales, 1)
                    linear_a8(x, x_scale, weight, scale, epilogue, torch.bfloat16)


def groups():
    pairs = [("int4/group128/zero", "int4/group128"), ("int4/group64", "int4/row"), ("fp4/group128/m2", "fp8/row")]
    for text, act in pairs[: 3 if has_format("fp8", CAPABILITY) else 2]:
        form, of_x = Format.parse(text), Format.parse(act)
        codes = torch.float8_e4m3fn if of_x.is_float else torch.int8
        parts = prepare_group(*quantize_tensor(torch.randn(N, K), form).stored_parts, form, of_x, K)
        weight = GroupWeight(*parts, group_layout_of(form, of_x), K)
        for m in ROWS:
            residual = torch.randn(m, N).bfloat16()
            for epilogue in (Epilogue(), Epilogue(residual[0], residual)):
                x, x_scale = torch.ones(m, K).to(codes), torch.rand(m, of_x.groups(K))
                linear_group(x, x_scale, weight, epilogue, of_x, torch.bfloat16)


def experts():
    for text, count in (("int4/group128/zero", 8), ("int8/row", 1)):
        for k in (128, K):
            form = Format.parse(text)
            q = quantize_tensor(torch.randn(count, N, k), form)
            weight = PackedWeight(*prepare_experts(*q.stored_parts, form, k, torch.bfloat16), layout_of(form), k)
            for m in ROWS:
                x, ends = torch.randn(m, k).bfloat16(), torch.full((count,), m, dtype=torch.int32)
                linear_experts(x, None, ends, weight)
                linear_experts(x, torch.zeros(2 * m, dtype=torch.int64), ends, weight)


def quantized_experts():
    form, layout = Format.parse("int4/group128/dual"), byte_layout_of(Format.parse("int4/group128/dual"))
    packed, steps, scale = prepare_experts_w4a8(*quantize_tensor(torch.randn(8, N, K), form).stored_parts, form, K)
    codes = [torch.int8, torch.float8_e4m3fn] if has_format("fp8", CAPABILITY) else [torch.int8]
    for m, gather in ((m, gather) for m in ROWS for gather in (False, True)):
        indices = torch.zeros(2 * m, dtype=torch.int64) if gather else None
        ends = torch.full((8,), m, dtype=torch.int32)
        for code in codes:
            x, weight, out = (
                torch.ones(*s).to(t) for s, t in (((m, K), code), ((8, N, K), code), ((2 * m, N), torch.half))
            )
            plan = plan_experts_a8(x, indices, ends, N, torch.half)
            plan.run(
                (x, indices, ends, weight, scale, None, torch.rand(m, 1), None), out, len(indices) if gather else m, N
            )
        x = torch.ones(m, K, dtype=torch.int8)
        plan = plan_experts_w4a8(x, indices, ends, N, layout, torch.half)
        plan.run(
            (x, indices, ends, packed, scale, None, torch.rand(m, 1), steps), out, len(indices) if gather else m, N
        )


def rows():
    codes = [codes for codes in ("int8", "fp8", "int4") if codes == "int4" or has_format(codes, CAPABILITY)]
    for code, m in ((code, m) for code in codes for m in (1, 16)):
        x, of_channel = torch.randn(m, 4096).bfloat16(), torch.randn(4096)
        row_quant(RowQuant("bf16", codes=code), x)
        row_quant(RowQuant("bf16", "rms", residual=True, codes=code), x, 1e-6, residual=x, gain=of_channel)
        row_quant(RowQuant("bf16", "gate", codes=code, group=128), x, gate=x)


for part in (weight_only, eight_bit, groups, experts, quantized_experts, rows):
    part()
for launch in fake.launches:
    print(json.dumps([launch.name, launch.grid, launch.shared, launch.signature]))
