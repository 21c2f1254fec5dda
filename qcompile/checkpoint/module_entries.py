"""What a checkpoint says of the modules that quantization put into a model: plain data, and back to empty modules.

{"kind": "QuantLinear", "in": K, "out": N, "format": .., "act": .., "has": [buffers], "rank": m}
{"kind": "QuantStack", "format": .., "columns": K, "rows_first": .., "dtype": .., "tensors": {name: [shape, dtype]}}
{"kind": "Prefix" | "Centers" | "Scales", "shapes": {buffer: shape}}
{"kind": "RMSNorm", "shape": .., "eps": ..}
{"kind": "RotatedLinear"}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.modules.kv_constants import Centers, Prefix, Scales
from qcompile.modules.quant_experts import STACK_SUFFIX, QuantStack, replace_parameter
from qcompile.modules.quant_linear import BUFFERS, QuantLinear, RotatedLinear
from qcompile.numerics.format import Format

Entry = Mapping[str, Any]
"""The description of one module, as read from JSON."""

_CONSTANTS: dict[str, type[Prefix] | type[Centers] | type[Scales]] = {
    "Prefix": Prefix,
    "Centers": Centers,
    "Scales": Scales,
}


def describe(module: nn.Module) -> dict[str, Any] | None:
    """The entry of a module, or None for one that the float model has too."""
    if isinstance(module, QuantLinear):
        return {
            "kind": "QuantLinear",
            "in": module.in_features,
            "out": module.out_features,
            "format": str(module.format),
            "act": str(module.act) if module.act else None,
            "has": [name for name in BUFFERS if getattr(module, name) is not None],
            "rank": 0 if module.low_in is None else module.low_in.shape[0],
        }
    if isinstance(module, QuantStack):
        return {"kind": "QuantStack", **module.describe()}
    if isinstance(module, (Prefix, Centers, Scales)):
        return {"kind": type(module).__name__, "shapes": {name: list(t.shape) for name, t in module.named_buffers()}}
    if isinstance(module, RotatedLinear):
        return {"kind": "RotatedLinear"}
    if isinstance(module, nn.RMSNorm):
        return {"kind": "RMSNorm", "shape": list(module.normalized_shape), "eps": module.eps}
    return None


def place(model: nn.Module, path: str, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
    """Put the module that an entry describes into a model, with unset buffers.

    Args:
        model: the float model, changed in place.
        path: the attribute path of the module.
        entry: what `describe` gave.
        tensors: the tensors of the checkpoint, by name.
    """
    kind = entry["kind"]
    if kind == "QuantLinear":
        act = Format.parse(entry["act"]) if entry["act"] else None
        format, has, rank = Format.parse(entry["format"]), set(entry["has"]), entry.get("rank", 0)
        model.set_submodule(path, QuantLinear.empty(entry["in"], entry["out"], format, act, has, rank))
    elif kind == "QuantStack":
        replace_parameter(model, path.removesuffix(STACK_SUFFIX), QuantStack.empty(entry))
    elif kind in _CONSTANTS:
        model.add_module(path, _CONSTANTS[kind].empty(entry["shapes"]))
    elif kind == "RMSNorm":
        model.set_submodule(path, nn.RMSNorm(entry["shape"], eps=entry["eps"]))
    else:
        inner = model.get_submodule(path)
        if not isinstance(inner, RotatedLinear):
            model.set_submodule(path, RotatedLinear(inner, torch.empty_like(tensors[f"{path}.signs"])))


def replaced_parameters(entries: Mapping[str, Entry]) -> set[str]:
    """The parameters of the float model that entries (by path) replace by a module of another name."""
    return {path.removesuffix(STACK_SUFFIX) for path, entry in entries.items() if entry["kind"] == "QuantStack"}
