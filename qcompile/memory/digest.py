"""Digests: one short text for the content of plain data, tensors and models, to recognize them by."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.memory.fingerprint import fingerprint

_NOT_CONTENT = {"_name_or_path", "transformers_version"}  # of a config: where a model came from


def digest(value: Any) -> str:
    """The SHA-256 of a value's content, 32 hexadecimal digits.

    Args:
        value: plain data, tensors, arrays, dataclasses, and mappings and sequences of them. Another object counts by
            its repr: where that is not the same for the same content, so is the digest, and nothing is mistaken.
    """
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:32]


def model_digest(model: nn.Module) -> str:
    """The digest of what a model computes: its structure, config, quantized recipe, parameters and buffers."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return digest(
        {
            "structure": re.sub(r"0x[0-9a-f]+", "", repr(model)),
            "config": {key: value for key, value in settings.items() if key not in _NOT_CONTENT},
            "recipe": getattr(model, "qcompile_recipe", None),
            "parameters": dict(model.named_parameters(remove_duplicate=False)),
            "buffers": dict(model.named_buffers(remove_duplicate=False)),
        }
    )


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield fingerprint(value)
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}"
        for key in sorted(value, key=repr):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}"
        for item in value:
            yield from _parts(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__qualname__
        yield from _parts({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif hasattr(value, "__array__"):
        yield from _parts(torch.as_tensor(value))
    else:
        yield f"{type(value).__qualname__} {value!r}"
