"""Safetensors files whose tensors are read when they are needed: each becomes a StoredTensor, small ones are read.

8 bytes      length of the header, little endian
header       JSON: name -> {"dtype", "shape", "data_offsets": [first, end]}, counted from the header's end
data         the tensors, row-major
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.tensor_file import DTYPES, INDEX, files_of, opened
from qcompile.memory.spilled_weights import SMALL
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.memory.tensor_bytes import read_values


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors files that hold the model of a folder of transformers.

    Raises:
        CheckpointError: there are none, or an index is damaged.
    """
    for name in ("model.safetensors", f"model{INDEX}"):
        if (folder / name).is_file():
            return files_of(folder / name)
    raise CheckpointError(
        f"{folder} holds no model.safetensors, and only such files are read in parts. Fix: save the model by "
        "save_pretrained first, or load it whole"
    )


def stored_tensors(files: Iterable[Path], small: int = SMALL) -> dict[str, Tensor]:
    """The tensors of safetensors files, by name.

    Args:
        files: each is opened and its header checked.
        small: bytes up to which a tensor is read now.

    Returns:
        A StoredTensor for every tensor that is larger.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with opened(file):  # checks the header against the length of the file
            pass
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            like = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            read = functools.partial(read_part, file, 8 + length + entry["data_offsets"][0], like)
            found[name] = StoredTensor(like, read) if like.nbytes > small else read()
    return found


def read_part(file: Path, first: int, like: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `like` from the bytes of a file behind `first`.

    Raises:
        CheckpointError: the file is gone or ends before.
    """
    try:
        with file.open("rb", buffering=0) as raw:
            raw.seek(first)
            return read_values(raw, like)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read any more ({error}). Fix: restore it, and run again") from error
