"""Which formats of quantized layers ONNX Runtime's CPU operators can compute."""

from __future__ import annotations

from torch import nn

from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear


class OnnxUnsupportedError(ValueError):
    """Something that has no ONNX operator; the text names every site (or node) and the fix."""


def check_supported(model: nn.Module, contrib_ops: bool = True) -> None:
    """Refuse all sites whose format has no ONNX operator, at once.

    Args:
        model: with QuantLinear and QuantStack modules.
        contrib_ops: whether the file may use operators of ONNX Runtime beside those of the ONNX standard.

    Raises:
        OnnxUnsupportedError: there are such sites.
    """
    unsupported = {
        path: reason
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantStack)
        and (reason := unsupported_reason(module, contrib_ops)) is not None
    }
    if unsupported:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in list(unsupported.items())[:20])
        raise OnnxUnsupportedError(
            f"{len(unsupported)} sites have no ONNX operator:\n{lines}\n"
            "Fix: use int8, w8a16, w4a16 or w4a8, or a rule that keeps them in float."
        )


def unsupported_reason(module: QuantLinear | QuantStack, contrib_ops: bool = True) -> str | None:
    """Why a site has no ONNX operator, or None if it has."""
    form, act = module.format, getattr(module, "act", None)
    if not contrib_ops and form.zero == "float":
        return f"{form}: DequantizeLinear takes integer zero points"
    if form.bits not in (2, 4, 8) or form.is_float:
        return f"{form}: ONNX Runtime's CPU operators take int2, int4 and int8 weights"
    if not contrib_ops and form.bits == 2:
        return f"{form}: DequantizeLinear of opset 21 takes int4 and int8 weights"
    if form.per == "tensor":
        return f"{form}: a scale for the whole weight (use int8/row)"
    if form.per == "group" and (form.group < 16 or form.group & (form.group - 1)):
        return f"{form}: blocks must be a power of two of at least 16"
    if act is not None and (act.per == "group" or act.zero == "float" or act.is_float):
        return f"activation {act}: only int8 or int4, symmetric or with integer zero points, per row or tensor"
    return None


def has_int4_and_int8_kernels(module: QuantLinear) -> bool:
    """Whether a site has two kernels: MatMulNBits on 4-bit codes (decode) and an int8 product (prefill)."""
    return module.format.dual and module.act is not None and module.act.is_int8_rows
