"""Quantized linears of any format."""

from __future__ import annotations

import torch

from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_signs
from qcompile.numerics.rounding import quantize_tensor


def linear(form: str, act: str, columns: int, bias: bool = True, signs: bool = False) -> QuantLinear:
    """24 outputs; act: format of the activations, "" for float; signs: behind an online Hadamard transform."""
    torch.manual_seed(0)
    q = quantize_tensor(torch.randn(24, columns), Format.parse(form), clip=True)  # of both signs, without zero points
    tensors = dict(codes=q.stored(), scale=q.scale, zero=q.zero, group_scale=q.group_scale)
    tensors["bias"] = torch.randn(24) if bias else None
    tensors["signs"] = random_signs(columns, 0).float() if signs else None
    return QuantLinear(columns, 24, q.format, Format.parse(act) if act else None, tensors)
