"""A folder of transformers whose weights are codes: shards and their index, configuration, tokenizer, model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.tensor_file import PLAIN_STEM, size_in_bytes, write_tensors
from qcompile.checkpoint.transformers_folder import CONFIG, write_files
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.float_tensors import float_tensors, model_dtype
from qcompile.checkpoint.writers.shard_reader import ShardReader
from qcompile.memory.fingerprint import as_bytes
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.recipe.strict_json import read_json


@dataclass(frozen=True)
class ServedLayout:
    """What a format makes of the quantized linears of a model.

    Attributes:
        target: the format.
        tensors: of all quantized linears, by name, on the CPU.
        quantization_config: of config.json.
        files: further JSON files, by name.
    """

    target: str
    tensors: dict[str, Tensor]
    quantization_config: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_served_folder(model: Any, layout: ServedLayout, work: Path, tokenizer: Any, shard: int | str) -> None:
    """Write everything but the model card, and read the tensors back.

    Args:
        model: of transformers, quantized.
        layout: of its quantized linears.
        work: the folder.
        tokenizer: of transformers; None for none.
        shard: the largest size of one file, in bytes or as "5GB".

    Raises:
        ExportError: a tensor of the files is not the one that was written, or a name stands twice.
    """
    rest = float_tensors(model, layout.target)
    twice = sorted(rest.keys() & layout.tensors.keys())
    if twice:
        raise ExportError(f"{twice[0]} is the name of codes and of a float tensor. Fix: rename the float one")
    tensors = _separate({**rest, **layout.tensors})
    write_tensors(tensors, work, PLAIN_STEM, size_in_bytes(shard), {"format": "pt"})
    _compare(work, tensors)
    write_files(model, tokenizer, work, mark=False)
    config = read_json(work / CONFIG)
    config["dtype"] = str(model_dtype(model)).removeprefix("torch.")
    config["quantization_config"] = layout.quantization_config
    for name, data in {CONFIG: config, **layout.files}.items():
        (work / name).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own: scales of sites that were quantized together are parts of one tensor."""
    found: dict[str, Tensor] = {}
    visited: set[int] = set()
    for name, tensor in tensors.items():
        if isinstance(tensor, StoredTensor):  # has no memory
            found[name] = tensor
            continue
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in visited
        found[name] = tensor if whole else tensor.clone()
        visited.add(storage.data_ptr())
    return found


def _compare(work: Path, tensors: dict[str, Tensor]) -> None:
    reader = ShardReader(work)
    if reader.files.keys() != tensors.keys():
        missing = sorted(tensors.keys() - reader.files.keys())[:3]
        raise ExportError(f"the files of {work.name} hold other tensors than were written (missing {missing})")
    for name, tensor in tensors.items():
        read = reader.tensor(name)
        if read.dtype != tensor.dtype or not torch.equal(as_bytes(read), as_bytes(tensor)):
            raise ExportError(f"{name} is not what was written. Fix: check the disk, and export again")
