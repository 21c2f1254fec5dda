"""transformers' own `save_pretrained` of a quantized model: refused.

What it writes has codes where `from_pretrained` looks for weights, which it then fills with random values.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantConv


def refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises CheckpointError. A function of a module, so that a model that has it can be copied and pickled."""
    raise CheckpointError(
        "save_pretrained writes a folder that from_pretrained fills with random weights, since this model has layers "
        "of qcompile. Fix: qcompile.save(model, folder), read by qcompile.load(folder); or qcompile.export_onnx"
    )


def forbid_save_pretrained(model: nn.Module) -> None:
    """Make a model's `save_pretrained` raise; nothing if it has none, or no quantized module."""
    kinds = QuantLinear | RotatedLinear | QuantStack | StaticQuantConv
    if hasattr(type(model), "save_pretrained") and any(isinstance(module, kinds) for module in model.modules()):
        object.__setattr__(model, "save_pretrained", refuse_save_pretrained)
