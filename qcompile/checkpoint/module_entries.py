"""What a checkpoint says of the modules that quantization put into a model: plain data, and back to modules.

{"kind": "QuantLinear", "in": K, "out": N, "format": .., "act": .., "has": [buffers], "rank": m}
{"kind": "StaticQuantLinear", .. as QuantLinear, "codes": [smallest, largest code of x]}
{"kind": "StaticQuantConv", "size": [O, C / groups, ..], "moves": [stride, padding, dilation], "groups": ..,
 "format": .., "codes": .., "has": [buffers]}
{"kind": "QuantStack", "format": .., "columns": K, "rows_first": .., "dtype": .., "tensors": {name: [shape, dtype]}}
{"kind": "Prefix" | "Centers" | "Scales", "shapes": {buffer: shape}}
{"kind": "RMSNorm", "shape": .., "eps": .., "affine": ..}
{"kind": "RotatedLinear"}
{"kind": "Alias", "of": path}       a module of the above kinds that stands in two places
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.static_entries import build_conv, describe_conv, static_scale
from qcompile.checkpoint.stored_checks import (
    FLOATS,
    check_no_nan,
    check_positive,
    check_signs,
    check_stored,
    refuse,
    require,
)
from qcompile.ir.quantized_stacks import STACK_SUFFIX
from qcompile.modules.kv_constants import Centers, Prefix, Scales
from qcompile.modules.quant_experts import QuantStack
from qcompile.modules.quant_linear import BUFFERS, QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantConv, StaticQuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS

Entry = Mapping[str, Any]
"""The description of one module, as read from JSON."""

_RANK_DTYPES = (*FLOATS, torch.int8)  # of a low-rank correction: int8 with a scale, else float


def describe(module: nn.Module) -> dict[str, Any] | None:
    """The entry of a module, or None for one that the float model has too."""
    if isinstance(module, StaticQuantConv):
        return {"kind": "StaticQuantConv", **describe_conv(module)}
    if isinstance(module, QuantLinear):
        is_static = isinstance(module, StaticQuantLinear)
        return {
            "kind": "StaticQuantLinear" if is_static else "QuantLinear",
            **({"codes": [module.low, module.high]} if is_static else {}),
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
    if type(module) is nn.RMSNorm:  # what a pass puts in; a subclass is the float model's own
        affine = module.elementwise_affine
        return {"kind": "RMSNorm", "shape": list(module.normalized_shape), "eps": module.eps, "affine": affine}
    return None


def build(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None = None) -> nn.Module:
    """The module that an entry describes, with the tensors of a checkpoint, which are checked.

    Args:
        path: the attribute path of the module.
        entry: what `describe` gave; any kind but Alias.
        tensors: those below `path`, by the rest of their names.
        inner: the float module at that path, for a RotatedLinear.

    Raises:
        CheckpointError: the entry is no entry, or a tensor is not as it demands.
    """
    kind = entry.get("kind")
    builder = _BUILDERS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        raise CheckpointError(f"{path!r} is a module of the unknown kind {kind!r}. Fix: save the model again")
    try:
        return builder(path, entry, tensors, inner)
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path!r} is described as {dict(entry)!r:.200}, which is no {kind} ({reason}). Fix: save the model again"
        ) from error


def _quant_linear(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    format = Format.parse(entry["format"])
    act = Format.parse(entry["act"]) if entry["act"] is not None else None
    rows, columns, rank = (_size(entry.get(key, 0)) for key in ("out", "in", "rank"))
    if set(entry["has"]) != tensors.keys() or not tensors.keys() <= set(BUFFERS):
        raise CheckpointError(
            f"{path!r} has the tensors {sorted(tensors)}, not {sorted(entry['has'])}. Fix: save again"
        )
    check_stored(path, {n: t for n, t in tensors.items() if n in PARTS}, format, (rows,), columns)
    specs = {"bias": (rows,), "low_in": (rank, columns), "low_in_scale": (rank, 1)}
    specs |= {"low_out": (rows, rank), "low_out_scale": (rows, 1)}
    for name in sorted(tensors.keys() & specs.keys()):
        full = f"{path}.{name}"
        require(full, tensors[name], (specs[name], FLOATS if name.endswith(("bias", "scale")) else _RANK_DTYPES))
        if name.endswith("scale"):
            check_positive(full, tensors[name])
        elif name.startswith("low") and (tensors[name].dtype == torch.int8) != (f"{name}_scale" in tensors):
            refuse(full, "is int8 without a scale, or float with one")
        check_no_nan(full, tensors[name])
    if ("low_in" in tensors) != ("low_out" in tensors):
        raise CheckpointError(f"{path!r} has one factor of a low-rank correction only. Fix: save the model again")
    if "signs" in tensors:
        check_signs(f"{path}.signs", tensors["signs"], columns)
    return QuantLinear(columns, rows, format, act, dict(tensors))


def _static_linear(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    act_scale = static_scale(path, tensors, entry)
    weight = _quant_linear(path, entry, {n: t for n, t in tensors.items() if n != "act_scale"}, inner)
    assert isinstance(weight, QuantLinear)
    return StaticQuantLinear(weight, act_scale, *entry["codes"])


def _static_conv(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    return build_conv(path, entry, tensors)


def _quant_stack(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    format, columns, dtype = Format.parse(entry["format"]), _size(entry["columns"]), getattr(torch, entry["dtype"])
    if dtype not in FLOATS or not isinstance(entry["rows_first"], bool) or tensors.keys() != entry["tensors"].keys():
        raise ValueError("its dtype is no float, or its layout is not known")
    check_stored(path, tensors, format, tensors["codes"].shape[:2], columns)
    return QuantStack({name: tensors.get(name) for name in PARTS}, format, columns, entry["rows_first"], dtype)


def _rotated(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    signs = tensors["signs"]
    weight = getattr(inner, "weight", None)
    if inner is None or not isinstance(weight, Tensor) or weight.ndim != 2 or signs.numel() not in weight.shape:
        raise CheckpointError(
            f"{path!r} is no linear of {signs.numel()} inputs. Fix: pass the model that was quantized"
        )
    check_signs(f"{path}.signs", signs, signs.numel())
    return RotatedLinear(inner, signs)


def _rms_norm(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    shape, eps, affine = [_size(size) for size in entry["shape"]], entry["eps"], entry.get("affine", True)
    if not (eps is None or (isinstance(eps, float) and 0 <= eps < 1)) or set(tensors) != (
        {"weight"} if affine else set()
    ):
        raise ValueError("its eps or its tensors are not those of a norm")
    norm = nn.RMSNorm(shape, eps=eps, elementwise_affine=affine, device="meta")
    if affine:
        require(f"{path}.weight", tensors["weight"], (shape, FLOATS))
        norm.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    return norm


def _prefix(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    _require_described(entry, tensors)
    ids, logits = tensors["ids"], tensors["logits"]
    require(f"{path}.ids", ids, ((ids.numel(),), (torch.int64,)))
    in_range = ids.is_meta or (ids.numel() and 0 <= int(ids.min()) <= int(ids.max()) < logits.shape[-1])
    if logits.ndim != 3 or not ids.numel() or not in_range:
        refuse(f"{path}.ids", "are not tokens of the logits beside them")
    require(f"{path}.logits", logits, ((1, len(ids), logits.shape[2]), FLOATS))
    layers = [(tensors[f"keys{i}"], tensors[f"values{i}"]) for i in range(len(tensors) // 2 - 1)]
    for pair in layers:
        for part in pair:
            require(f"{path}, of one layer,", part, ((1, part.shape[1], len(ids), part.shape[3]), FLOATS))
    for name, tensor in tensors.items():
        check_no_nan(f"{path}.{name}", tensor)
    return Prefix(ids, layers, logits)


def _centers(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    _require_described(entry, tensors)
    centers = [tensors[f"center{i}"] for i in range(len(tensors))]
    for index, center in enumerate(centers):
        require(f"{path}.center{index}", center, ((center.shape[0], center.shape[-1]), FLOATS))
        check_no_nan(f"{path}.center{index}", center)
    return Centers(centers)


def _scales(path: str, entry: Entry, tensors: Mapping[str, Tensor], inner: nn.Module | None) -> nn.Module:
    _require_described(entry, tensors)
    scales = [(tensors[f"keys{i}"], tensors[f"values{i}"]) for i in range((len(tensors) + 1) // 2)]
    for pair in scales:
        for part in pair:
            require(f"{path}, of one layer,", part, ((part.shape[0], part.shape[-1]), (torch.float32,)))
            check_positive(f"{path}, of one layer,", part)
    return Scales(scales)


def _require_described(entry: Entry, tensors: Mapping[str, Tensor]) -> None:
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != entry["shapes"]:
        raise ValueError("its tensors have other names or shapes")


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{value!r} is no size")
    return value


_BUILDERS: dict[str, Callable[[str, Entry, Mapping[str, Tensor], nn.Module | None], nn.Module]] = {
    "QuantLinear": _quant_linear,
    "StaticQuantLinear": _static_linear,
    "StaticQuantConv": _static_conv,
    "QuantStack": _quant_stack,
    "RotatedLinear": _rotated,
    "RMSNorm": _rms_norm,
    "Prefix": _prefix,
    "Centers": _centers,
    "Scales": _scales,
}


def replaced_parameters(entries: Mapping[str, Entry]) -> set[str]:
    """The parameters of the float model that entries (by path) replace by a module of another name."""
    return {path.removesuffix(STACK_SUFFIX) for path, entry in entries.items() if entry.get("kind") == "QuantStack"}
