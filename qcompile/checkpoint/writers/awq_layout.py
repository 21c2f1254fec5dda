"""AWQ's checkpoint layout ("gemm"), which AutoAWQ and vLLM read: eight channels of N in a word.

    qweight  int32 [K, N / 8]       nibble i of a word is channel 8 n + ORDER[i]
    qzeros   int32 [G, N / 8]       zero points in the same order
    scales   16 bits [G, N]

with w = s (q - z), 4 bits, groups, integer zero points. Source: AutoAWQ, awq/utils/packing_utils.py, and vLLM 0.33,
model_executor/layers/quantization/awq.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.deferred_tensors import deferred
from qcompile.checkpoint.writers.export_refusals import quantized_linears, refuse
from qcompile.checkpoint.writers.float_tensors import model_dtype
from qcompile.checkpoint.writers.gptq_layout import check_sixteen_bits, one_format
from qcompile.checkpoint.writers.int32_words import pack_words, unsigned_codes
from qcompile.checkpoint.writers.served_folder import ServedLayout
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format

TARGET = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def check_awq(site: str, form: Format, act: Format | None, columns: int, dtype: torch.dtype) -> None:
    """Refuse a site that this layout cannot say.

    Args:
        site: its path.
        form: format of the weight.
        act: format of the activation, which must be float.
        columns: K.
        dtype: of the model.

    Raises:
        ExportError: with the site and the fix.
    """
    check_sixteen_bits(TARGET, site, form, act, columns, dtype)
    if (form.dtype, form.per, form.zero, form.dual) != ("int4", "group", "int", False):
        refuse(TARGET, site, f"weights in {form}", "use int4/group128/zero/bf16, or export to gptq")


def awq_layout(model: nn.Module) -> ServedLayout:
    """All quantized linears of a model.

    Raises:
        ExportError: a site that cannot be said, or two formats.
    """
    linears, dtype = quantized_linears(model), model_dtype(model)
    form, tensors = one_format(TARGET, linears), dict[str, Tensor]()
    for path, linear in linears.items():
        check_awq(path, linear.format, linear.act, linear.in_features, dtype)
        if linear.out_features % len(ORDER):
            fix = f"keep it float, Rule('{path}.*', keep=True)"
            refuse(TARGET, path, f"N = {linear.out_features}, no multiple of {len(ORDER)}", fix)
        found = deferred(lambda linear: _tensors(linear, dtype), linear)
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in found.items()}
    config = {
        "quant_method": TARGET,
        "bits": 4,
        "group_size": form.group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [p for p, module in model.named_modules() if isinstance(module, nn.Linear)],
    }
    return ServedLayout(TARGET, tensors, config)


def _tensors(linear: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    assert linear.zero is not None
    codes = unsigned_codes(linear.codes.detach().cpu(), linear.format, linear.in_features)
    found = {
        "qweight": _interleaved(codes.t()),
        "qzeros": _interleaved(linear.zero.detach().cpu().t()),
        "scales": linear.scale.detach().cpu().t(),
    }
    if linear.bias is not None:
        found["bias"] = linear.bias.detach().cpu().to(dtype)
    return found


def _interleaved(unsigned: Tensor) -> Tensor:
    """Unsigned codes [rows, N] -> int32 [rows, N / 8]."""
    eights = torch.unflatten(unsigned, 1, (-1, len(ORDER)))
    return pack_words(eights[..., list(ORDER)].flatten(1), 4)
