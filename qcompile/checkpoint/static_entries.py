"""Entries of modules with a static scale of activations: described, and read back with every tensor checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.stored_checks import FLOATS, check_no_nan, check_positive, check_stored, require
from qcompile.modules.static_quant import StaticQuantConv
from qcompile.numerics.code_convolution import ConvolutionShape
from qcompile.numerics.format import Format

_LARGEST = 2**20  # stride, padding, dilation and sizes of a kernel stay far below


def describe_conv(module: StaticQuantConv) -> dict[str, Any]:
    """The entry of a convolution, without its kind."""
    shape = module.shape
    return {
        "size": list(module.size),
        "moves": [list(sizes) for sizes in (shape.stride, shape.padding, shape.dilation)],
        "groups": shape.groups,
        "format": str(module.format),
        "codes": [module.low, module.high],
        "has": [name for name, tensor in module.named_buffers()],
    }


def build_conv(path: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StaticQuantConv:
    """The convolution that an entry describes.

    Raises:
        CheckpointError: a tensor is not as the entry demands.
        ValueError: the entry is no entry.
    """
    size, format = tuple(_count(value, 1) for value in entry["size"]), Format.parse(entry["format"])
    spatial = len(size) - 2
    stride, padding, dilation = moves = [
        tuple(_count(value, least) for value in values) for values, least in zip(entry["moves"], (1, 0, 1), strict=True)
    ]
    groups = _count(entry["groups"], 1)
    if spatial not in (1, 2) or any(len(sizes) != spatial for sizes in moves) or size[0] % groups:
        raise ValueError("its sizes are those of no convolution")
    if set(entry["has"]) != tensors.keys() or not tensors.keys() <= {"codes", "scale", "act_scale", "bias"}:
        raise ValueError(f"it has the tensors {sorted(tensors)}, not {sorted(entry['has'])}")
    if format.per != "tensor" or format.zero != "none" or format.is_float:
        raise ValueError(f"{format} is no format of its codes")
    columns = torch.Size(size[1:]).numel()
    check_stored(path, {name: tensors[name] for name in ("codes", "scale")}, format, size[:1], columns)
    static_scale(path, tensors, entry)
    if "bias" in tensors:
        require(f"{path}.bias", tensors["bias"], (size[:1], FLOATS))
        check_no_nan(f"{path}.bias", tensors["bias"])
    shape = ConvolutionShape(stride, padding, dilation, groups)
    return StaticQuantConv(dict(tensors), size, shape, format, *entry["codes"])


def static_scale(path: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    """The scale of activations, checked, with the codes that an entry says they have.

    Raises:
        CheckpointError: it is no positive float32 scalar.
        ValueError: the codes are not those of int8.
    """
    low, high = entry["codes"]
    if type(low) is not int or type(high) is not int or not -127 <= low <= 0 < high <= 127:
        raise ValueError(f"codes of activations from {low!r} to {high!r} are none of int8")
    require(f"{path}.act_scale", tensors["act_scale"], ((), (torch.float32,)))
    check_positive(f"{path}.act_scale", tensors["act_scale"])
    return tensors["act_scale"]


def _count(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError(f"{value!r} is no size")
    return value
