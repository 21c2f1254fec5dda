"""Weights as tensors of torchao, from which ExecuTorch makes programs for its XNNPACK kernels.

    IntxUnpackedToInt8Tensor    w = s (q - z): q int8 [N, K], s [N, G], z int8 [N, G], which is zero here

XNNPACK multiplies int8 activations, which have a scale and a zero point for each token, with int8 rows or with int4
groups. It keeps scales of int4 weights in bfloat16 (a row is one group), reads no zero points of weights, and takes
positive scales only.

Source: torchao 0.18, quantize_/workflows/intx/intx_unpacked_to_int8_tensor.py; ExecuTorch 1.5,
backends/xnnpack/operators/node_visitor.py and quant_params.py; XNNPACK, src/tensor.c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.compressed_tensors_proof import require_same
from qcompile.checkpoint.writers.export_refusals import quantized_linears, refuse
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import unpack_codes

TARGET = "executorch"
_ACT = "int8/row/zero"
_BLOCK = 32  # columns that a group is a multiple of


def check_xnnpack(site: str, form: Format, act: Format | None, columns: int, dtype: torch.dtype) -> None:
    """Refuse a site that XNNPACK has no kernel for.

    Args:
        site: its path.
        form: format of the weight.
        act: format of the activation.
        columns: K.
        dtype: of the model; any, as programs compute in float32.

    Raises:
        ExportError: with the site, the value and the fix.
    """
    if form.is_float or form.two_level or form.dtype not in ("int4", "int8"):
        refuse(TARGET, site, f"weights in {form}", "use int4/group32/bf16 or int8/row")
    if form.zero != "none":
        what = f"weights in {form}, which have zero points"
        refuse(TARGET, site, what, "use symmetric weights, as int4/group32/bf16 or int8/row")
    if str(act) != _ACT:
        what = f"activations in {act or 'float'} (its kernels take int8 with a zero point of each token)"
        refuse(TARGET, site, what, f"quantize them to {_ACT} (of logits by lm_head_act), or keep the site float")
    if form.dtype == "int8":
        if form.per == "group":
            refuse(TARGET, site, f"int8 weights in groups ({form})", "use int8/row, or int4/group32/bf16")
        return
    width = form.width(columns)
    if columns % width or width % _BLOCK:
        what = f"groups of {width} columns (K = {columns}), where whole groups of a multiple of {_BLOCK} are"
        refuse(TARGET, site, what, f"use int4/group32/bf16, or int8/row where {_BLOCK} do not divide K")
    if form.scale != "bf16":
        text = f"{str(form).removesuffix(f'/{form.scale}')}/bf16"
        refuse(TARGET, site, f"scales of {form}, where int4 weights have bfloat16 ones", f"quantize to {text}")


def check_xnnpack_linear(site: str, linear: QuantLinear) -> None:
    """Refuse a quantized linear that XNNPACK has no kernel for.

    Raises:
        ExportError: as of `check_xnnpack`, or a scale that is not positive.
    """
    check_xnnpack(site, linear.format, linear.act, linear.in_features, torch.float32)
    least = float(linear.scale.min())
    if not least > 0:
        refuse(TARGET, site, f"a scale of {least:.3g}, which is not above zero", "quantize without clip=True")


def intx_weight(site: str, linear: QuantLinear) -> Tensor:
    """A weight as torchao has it, with int8 activations of each token.

    Args:
        site: its path, for messages.
        linear: quantized; one that `check_xnnpack_linear` takes.

    Returns:
        IntxUnpackedToInt8Tensor [N, K] of float32, on the CPU.

    Raises:
        ExportError: as of `check_xnnpack_linear`, or torchao dequantizes another weight.
    """
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    form, rows, columns = linear.format, linear.out_features, linear.in_features
    check_xnnpack_linear(site, linear)
    width = form.width(columns)
    scale = linear.scale.detach().cpu().float()
    scale = (scale if form.per == "group" else scale.reshape(-1, 1).expand(rows, 1)).clone()
    codes = unpack_codes(linear.codes.detach().cpu(), form, columns).to(torch.int8)
    made: Tensor = IntxUnpackedToInt8Tensor(
        codes, scale, torch.zeros_like(scale, dtype=torch.int8), getattr(torch, form.dtype), (1, width), torch.float32,
        IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )  # fmt: skip
    read: Any = made
    require_same(site, read.dequantize(), linear.weight.cpu(), "torchao")
    return made


def take_intx_weights(model: nn.Module) -> int:
    """Put an nn.Linear with a tensor of torchao in the place of every quantized linear.

    Args:
        model: quantized, in float32 else; changed.

    Returns:
        How many weights torchao dequantized to the same values, bit for bit.

    Raises:
        ExportError: as of `intx_weight`.
    """
    linears = quantized_linears(model)
    made: dict[int, nn.Linear] = {}
    for path, linear in linears.items():
        if id(linear) not in made:  # one that stands in two places stays one
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(intx_weight(path, linear), requires_grad=False)
            if linear.bias is not None:
                plain.bias = nn.Parameter(linear.bias.detach().cpu().float(), requires_grad=False)
            made[id(linear)] = plain
        model.set_submodule(path, made[id(linear)])
    return len(linears)
