"""Random weights of gemm_w4a8, and the integers that they stand for."""

from __future__ import annotations

import torch
from kernel_cases import DEVICE, randn

from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.launch.w4a8 import ByteWeight, prepare_w4a8
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor, dequantize_to_int8
from qcompile.numerics.rounding import quantize_tensor

FORMS = ["int4/group128/zero/dual", "int4/group64/zero/dual", "int4/group32/zero/dual", "int4/group256/zero/dual",
         "int4/group128/dual", "int4/group32/dual", "int4/row/zero", "int4/row", "int4/row/zero/bf16"]  # fmt: skip


def byte_weight(form, n, k, seed=1, extreme=False):
    """A weight for gemm_w4a8, and its integers [N, K] in float64, made by the definition of its format.

    Args:
        form: a format of FORMS.
        n: output channels.
        k: input channels.
        seed: of its values.
        extreme: codes of every s1 from 1 to 127 in a format with zero points, as far as s1 (q - z) fits int8.
    """
    form = Format.parse(form)
    q = _extreme(form, n, k, seed) if extreme else quantize_tensor(randn(n, k, seed=seed).cpu(), form)
    if form.dual and form.zero == "none":  # a clip search gives some groups negative scales
        q.group_scale[:, ::2] *= -1
    if form.dual:
        integers = dequantize_to_int8(q.codes, q.zero, q.group_scale, form).double()
    else:
        integers = q.codes.double() - (0 if q.zero is None else q.zero.double())
    packed, steps, scale = prepare_w4a8(*(None if t is None else t.to(DEVICE) for t in q.stored_parts), form, k)
    return ByteWeight(packed, steps, scale, byte_layout_of(form), k), integers.to(DEVICE)


def _extreme(form, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = k // form.group
    steps = torch.randint(1, 128, (n, groups), generator=generator)
    steps[0], steps[1] = 127, 1
    zero = torch.randint(0, 16, (n, groups), generator=generator)
    zero[0] = 15
    codes = torch.randint(0, 16, (n, groups, form.group), generator=generator)
    reach = (127 // steps)[..., None]
    codes = codes.clamp(zero[..., None] - reach, zero[..., None] + reach).clamp(0, 15)
    scale = torch.full((n, 1), 2.0**-6)
    return QTensor(codes.reshape(n, k).to(torch.uint8), scale, zero.to(torch.uint8), steps.to(torch.int8), form)
