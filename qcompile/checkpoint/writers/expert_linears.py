"""Stacks of experts as the linears that checkpoints store: which rows of a stack each of them is.

A model of transformers holds the experts of a layer in one parameter of three dimensions, a checkpoint each of their
linears as a tensor. transformers itself says how: it is given the index of every row in the place of its values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.export_refusals import quantized_linears, refuse
from qcompile.ir.quantized_stacks import STACK_SUFFIX
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.qtensor import PARTS


def quantized_stacks(model: nn.Module) -> dict[str, QuantStack]:
    """The quantized stacks of a model, by the name of the parameter that each replaces."""
    named = model.named_modules()
    return {path.removesuffix(STACK_SUFFIX): module for path, module in named if isinstance(module, QuantStack)}


def served_linears(model: nn.Module, target: str) -> dict[str, QuantLinear]:
    """The quantized linears of a model, and those of its experts by the names of checkpoints.

    Args:
        model: of transformers, quantized.
        target: the format, for messages.

    Raises:
        ExportError: checkpoints do not store a stack as rows of it.
    """
    found = quantized_linears(model)
    for name, stack in quantized_stacks(model).items():
        for path, rows in _rows_of(model, name, stack, target).items():
            found[path] = _linear(stack, rows)
    return found


def stack_columns(model: Any) -> dict[str, int]:
    """K of every float parameter that checkpoints store as linears of experts, by its name."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            parts = dict(revert_weight_conversion(model, {name: torch.empty_like(parameter, device="meta")}))
            sizes = {part.shape[-1] for key, part in parts.items() if part.ndim == 2 and key.endswith(".weight")}
            if len(parts) > 1 and len(sizes) == 1:
                found[name] = int(sizes.pop())
    return found


def _rows_of(model: nn.Module, name: str, stack: QuantStack, target: str) -> dict[str, Tensor]:
    """Path of a linear in checkpoints -> the rows [N] of the stack [E N, K] that it has."""
    from transformers.core_model_loading import revert_weight_conversion

    experts, rows = stack.codes.shape[:2]
    index = torch.arange(experts * rows, dtype=torch.float64).view(experts, rows, 1).expand(-1, -1, stack.columns)
    parts = dict(revert_weight_conversion(model, {name: index if stack.rows_first else index.transpose(1, 2)}))
    found: dict[str, Tensor] = {}
    for key, part in parts.items():
        whole = part.ndim == 2 and part.shape[1] == stack.columns and bool((part == part[:, :1]).all())
        if not key.endswith(".weight") or not whole:
            fix = f"keep it float, Rule({name!r}, keep=True)"
            refuse(target, name, f"a stack that checkpoints do not store as rows of it ({key})", fix)
        found[key.removesuffix(".weight")] = part[:, 0].long()
    return found


def _linear(stack: QuantStack, rows: Tensor) -> QuantLinear:
    parts = (getattr(stack, name) for name in PARTS)
    chosen = [
        part if part is None or part.ndim < 3 else part.detach().cpu().flatten(0, 1).index_select(0, rows)
        for part in parts
    ]
    tensors: dict[str, Tensor | None] = dict(zip(PARTS, chosen, strict=True))
    return QuantLinear(stack.columns, len(rows), stack.format, None, tensors)
