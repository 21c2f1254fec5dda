"""The linear layer of 4-bit weights in groups by 8-bit codes, as `kernels tune` times it, x quantized before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.group_layout import group_layout_of
from qcompile.codegen.triton.kernels.kernel_support import row_quant_codes
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.gemm import Epilogue
from qcompile.codegen.triton.launch.group_gemm import GroupWeight, linear_group, prepare_group
from qcompile.codegen.triton.launch.row_quant import row_quant
from qcompile.codegen.triton.tuning.baselines import WeightCopies, random_weight
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor


def random_group_weight(form: Format, act: Format, k: int, n: int, device: torch.device) -> GroupWeight:
    """A random quantized weight [N, K] on a device, prepared for gemm_group or gemm_fp4_fp8."""
    q = quantize_tensor(random_weight(k, n, device), form)
    layout = group_layout_of(form, act)
    assert layout is not None
    return GroupWeight(*prepare_group(*q.stored_parts, form, act, k), layout, k)


def group_call(weights: WeightCopies, form: Format, act: Format, m: int) -> Callable[[int], Tensor]:
    """call(i): x [m, K] quantized, and multiplied by copy i of the weight and its words, which come from memory.

    A format of x that row_quant does not write is PyTorch's, as in a model.
    """
    x, codes = weights.normal(m, weights.k).bfloat16(), row_quant_codes(act)
    first = random_group_weight(form, act, weights.k, weights.n, weights.device)
    copies = [
        dataclasses.replace(first, packed=first.packed.clone(), words=first.words.clone())
        for _ in range(weights.copies)
    ]
    spec = None if codes is None else RowQuant("bf16", codes=codes, group=act.group, zero=act.zero != "none")

    def call(i: int) -> Tensor:
        if spec is None:
            q = quantize_tensor(x, act, check=False)
            x_codes, x_scale = q.codes, q.scale
            if q.zero is not None:
                x_codes = x_codes.to(torch.int8) - expand_groups(q.zero.to(torch.int8), act, weights.k)
        else:
            x_codes, x_scale, *_ = row_quant(spec, x)
        return linear_group(x_codes, x_scale, copies[i], Epilogue(), act, torch.bfloat16)

    return call
