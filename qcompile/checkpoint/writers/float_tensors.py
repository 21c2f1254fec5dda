"""The tensors of a model that stay as they are, by the names that checkpoints of transformers give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.writers.export_refusals import quantized_linears, refuse
from qcompile.modules.kv_constants import SCALES
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear

SHORT = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""A model's dtype of 16 bits -> its name as `Format.scale`."""


def float_tensors(model: Any, target: str) -> dict[str, Tensor]:
    """Everything but the quantized linears, each once, on the CPU.

    Args:
        model: of transformers.
        target: the format, for messages.

    Raises:
        ExportError: checkpoints name or cut the weight of a quantized linear otherwise than the model does.
    """
    from transformers.core_model_loading import revert_weight_conversion

    quantized = quantized_linears(model)
    codes = _stored_as_codes(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    kept = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name.rpartition(".")[0] not in codes and not (name in tied and tied[name] in state)
    }
    for path, linear in quantized.items():
        name, like = f"{path}.weight", torch.empty(linear.out_features, linear.in_features, device="meta")
        found = list(revert_weight_conversion(model, {name: like}))
        if found != [name]:
            fix = f"keep it float, Rule({name!r}, keep=True)"
            refuse(target, path, f"a weight that checkpoints store as {', '.join(found[:3]) or 'another'}", fix)
    renamed: dict[str, Tensor] = dict(revert_weight_conversion(model, kept))
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def stores_otherwise(model: Any) -> bool:
    """Whether checkpoints name or cut tensors otherwise than the model does, as stacks of experts."""
    from transformers.core_model_loading import revert_weight_conversion

    if any(isinstance(module, QuantStack) for module in model.modules()):
        return True
    codes = _stored_as_codes(model)
    named = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in codes}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in named.items()}
    return set(revert_weight_conversion(model, shapes)) != set(named)


def _stored_as_codes(model: nn.Module) -> set[str]:
    """Paths of the modules whose buffers are codes, or scales of a cache."""
    return {SCALES} | {
        path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear | QuantStack)
    }


def model_dtype(model: Any) -> torch.dtype:
    """The dtype that config.json names: that of the first float parameter which is not quantized."""
    found: torch.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return found
