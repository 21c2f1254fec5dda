"""The linear layer of 4-bit weights and int8 activations, as `kernels tune` times it: row_quant, then gemm_w4a8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.launch.gemm import Epilogue
from qcompile.codegen.triton.launch.row_quant import row_quant
from qcompile.codegen.triton.launch.w4a8 import ByteWeight, linear_w4a8, prepare_w4a8
from qcompile.codegen.triton.tuning.baselines import WeightCopies, random_weight
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor


def random_byte_weight(form: Format, k: int, n: int, device: torch.device) -> ByteWeight:
    """A random quantized weight [N, K] on a device, prepared for gemm_w4a8."""
    q = quantize_tensor(random_weight(k, n, device), form)
    layout = byte_layout_of(form)
    assert layout is not None
    return ByteWeight(*prepare_w4a8(*q.stored_parts, form, k), layout, k)


def w4a8_call(weights: WeightCopies, form: Format, m: int) -> Callable[[int], Tensor]:
    """call(i): x [m, K] quantized, and multiplied by copy i of the weight and its words, which come from memory."""
    x, spec = weights.normal(m, weights.k).bfloat16(), RowQuant("bf16")
    first = random_byte_weight(form, weights.k, weights.n, weights.device)
    copies = [
        dataclasses.replace(first, packed=first.packed.clone(), steps=first.steps.clone())
        for _ in range(weights.copies)
    ]

    def call(i: int) -> Tensor:
        x_codes, x_scale, *_ = row_quant(spec, x)
        return linear_w4a8(x_codes, x_scale, copies[i], Epilogue(), torch.bfloat16)

    return call
