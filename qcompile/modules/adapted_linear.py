"""A quantized linear with a QA-LoRA adapter: what is trained, and what it merges into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qcompile.ir.adapter_op  # noqa: F401  registers torch.ops.qcompile.group_adapter
from qcompile.modules.quant_linear import BUFFERS, QuantLinear
from qcompile.modules.training_module import TrainingModule
from qcompile.numerics.qtensor import PARTS, QTensor, expand_groups
from qcompile.numerics.zero_shift import shift_groups

MERGE_TOLERANCE = 1e-5


class AdaptedLinear(TrainingModule):
    """base(x) + scaling * pool(x) A^T B^T, where pool takes the mean of each group of channels (ir/adapter_op.py).

    Attributes:
        base_layer: the quantized linear, which is not trained.
        lora_a: [r, groups], a parameter.
        lora_b: [N, r], a parameter, zero at the start.
        group: columns of a group.
        scaling: alpha / r.
    """

    FIXED_DTYPE = ()

    def __init__(self, base_layer: QuantLinear, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a, self.lora_b = nn.Parameter(lora_a.clone()), nn.Parameter(lora_b.clone())
        self.group, self.scaling = base_layer.format.width(base_layer.in_features), scaling

    @property
    def weight(self) -> Tensor:
        """The weight of the base, without the adapter; see QuantLinear."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base."""
        return self.base_layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """x [.., K] -> [.., N]; the argument has the name that nn.Linear gives it."""
        out: Tensor = self.base_layer(input)
        x = self.base_layer.operand(input)
        adapter: Tensor = torch.ops.qcompile.group_adapter(x, self.lora_a, self.lora_b, self.group, self.scaling)
        return out + adapter.to(out.dtype)

    def settled(self) -> QuantLinear:
        """The linear with the adapter merged into its zero points."""
        with torch.no_grad():
            return merged(self.base_layer, self.lora_b.double() @ self.lora_a.double(), self.scaling)

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.lora_a.shape[0]}, group={self.group}, scaling={self.scaling:.4g}"


def merged(base: QuantLinear, product: Tensor, scaling: float) -> QuantLinear:
    """A quantized linear plus a group-pooled adapter, exactly: codes and scales stay, zero points become floats.

    Args:
        base: not changed.
        product: B A, [N, groups], float64.
        scaling: alpha / r.

    Raises:
        ValueError: NaN or Inf in the adapter, or one so large beside the scales that float32 zero points lose more of
            the weights than rounding of float32 does.
    """
    weight = QTensor.from_stored((base.codes, base.scale, base.zero, None), base.format, base.in_features)
    shifted = shifted_exactly(weight, product, scaling)
    tensors: dict[str, Tensor | None] = {name: getattr(base, name) for name in BUFFERS}
    tensors |= dict(zip(PARTS, shifted.stored_parts, strict=True))
    return QuantLinear(base.in_features, base.out_features, shifted.format, base.act, tensors)


def shifted_exactly(weight: QTensor, product: Tensor, scaling: float) -> QTensor:
    """A quantized weight plus what a group-pooled adapter adds to it, compared with the sum in float64.

    Args:
        weight: [N, K].
        product: B A, [N, groups], float64.
        scaling: alpha / r.

    Raises:
        ValueError: as of `merged`.
    """
    delta = scaling / weight.format.width(weight.columns) * product
    shifted = shift_groups(weight, delta)
    expected = weight.dequantize().double() + expand_groups(delta, weight.format, weight.columns)
    error = float((shifted.dequantize().double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= MERGE_TOLERANCE:
        raise ValueError(
            f"its adapter cannot be merged: the weights would change by {error:.1e} of the largest, more than "
            f"{MERGE_TOLERANCE:.0e}. Fix: train with a smaller learning rate, or load another checkpoint of it"
        )
    return shifted
