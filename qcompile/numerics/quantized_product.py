"""The product of an activation and a quantized weight: what every quantized site means.

With int8 codes of x, a scale for each token, and integer codes of W that share one float scale a channel, the sums are
exact in int32. Anything else is dequantized and multiplied in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.code_matmul import code_matmul
from qcompile.numerics.format import Format
from qcompile.numerics.int8_matmul import MAX_K
from qcompile.numerics.qtensor import StoredParts, dequantize_codes, dequantize_to_int8, unpack_codes


def quantized_product(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, stored: StoredParts, form: Format, act: str, columns: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dq(x) @ dq(W).T, accumulated in float32 (or exactly in int32), not rounded to a model's dtype.

    Args:
        x: [.., K]; float when `act` is "", else codes in the format `act`.
        x_scale: scale of the codes, or None.
        x_zero: their zero point, or None.
        stored: codes [N, ..] of W (see bit_packing.py), scale, zero point and group scale, as in QTensor.
        form: of W.
        act: the format of x, or "".
        columns: K.
        dtype: float64 widens everything to float64.

    Returns:
        [.., N] in float32, or float64.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, scale, zero, group_scale = stored
    codes = unpack_codes(weight, form, columns)
    if act and Format.parse(act).is_int8_rows and _integer_rows(form) and columns <= MAX_K:
        assert x_scale is not None
        if form.dual:
            codes = dequantize_to_int8(codes, zero, group_scale, form)
        sums = code_matmul(x.reshape(-1, columns), codes).reshape(*x.shape[:-1], len(codes))
        return sums.to(wide) * x_scale.to(wide) * scale.squeeze(-1).to(wide)
    if act:
        assert x_scale is not None
        x = dequantize_codes(x, x_scale, x_zero, None, Format.parse(act))
    values = dequantize_codes(codes, scale, zero, group_scale, form)
    return torch.nn.functional.linear(x.to(wide), values.to(wide))


def _integer_rows(form: Format) -> bool:
    """Whether the sum over K of products of codes is the whole integer part: a per-channel scale."""
    return form.dual or (form.dtype in ("int2", "int3", "int4", "int8") and form.per == "row" and form.zero == "none")
