"""A quantized stack of expert weights with a QA-LoRA adapter for each expert, which merges into it exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qcompile.ir.adapter_op  # noqa: F401  registers torch.ops.qcompile.stack_adapter
from qcompile.modules.adapted_linear import shifted_exactly
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.training_module import TrainingModule
from qcompile.numerics.qtensor import PARTS, QTensor


class AdaptedStack(TrainingModule):
    """Called, it gives the dequantized stack plus what the adapters add to it, differentiable in these.

    Attributes:
        base_stack: the quantized stack, which is not trained.
        lora_a: [E, r, groups], a parameter.
        lora_b: [E, N, r], a parameter, zero at the start.
        group: columns of a group.
        scaling: alpha / r.
    """

    FIXED_DTYPE = ()

    def __init__(self, base_stack: QuantStack, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        super().__init__()
        self.base_stack = base_stack
        self.lora_a, self.lora_b = nn.Parameter(lora_a.clone()), nn.Parameter(lora_b.clone())
        self.group, self.scaling = base_stack.format.width(base_stack.columns), scaling

    def forward(self) -> Tensor:
        """The stack, [E, N, K] or [E, K, N] as the model has it."""
        base = self.base_stack
        added: Tensor = torch.ops.qcompile.stack_adapter(
            self.lora_a, self.lora_b, base.columns, self.group, self.scaling, base.dtype
        )
        stack: Tensor = base()
        return stack + (added if base.rows_first else added.transpose(1, 2))

    @torch.no_grad()
    def settled(self) -> QuantStack:
        """The stack with the adapters merged into its zero points: codes and scales stay, zero points become floats."""
        base = self.base_stack
        experts = []
        for index in range(base.codes.shape[0]):  # one by one: the comparison is in float64
            stored = (base.codes[index], base.scale[index], None if base.zero is None else base.zero[index], None)
            product = self.lora_b[index].double() @ self.lora_a[index].double()
            weight = QTensor.from_stored(stored, base.format, base.columns)
            try:
                experts.append(shifted_exactly(weight, product, self.scaling))
            except ValueError as error:
                raise ValueError(f"expert {index}: {error}") from error
        parts = zip(*(expert.stored_parts for expert in experts), strict=True)
        stacked = [None if part[0] is None else torch.stack(list(part)) for part in parts]
        tensors = dict(zip(PARTS, stacked, strict=True))
        return QuantStack(tensors, experts[0].format, base.columns, base.rows_first, base.dtype)

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.lora_a.shape[1]}, group={self.group}, scaling={self.scaling:.4g}"
