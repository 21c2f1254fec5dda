"""Safetensors files, one or several with an index, and a digest of every tensor in them.

    model.safetensors                    all tensors, or
    model.safetensors.index.json         name of a tensor -> the file that has it, and
    model-00001-of-00003.safetensors ..  those files

A digest is the CRC-32 of dtype, shape and bytes: it finds every flipped bit and every run of up to 32 wrong bits, and
misses other damage once in 2^32. It is the fastest of what Python brings along (docs/guides/checkpoints.md has the
cost), and no defense against somebody who wants to deceive.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.memory.fingerprint import as_bytes
from qcompile.memory.tensor_bytes import write_values
from qcompile.recipe.strict_json import DamagedJson, read_json

PLAIN_STEM = "model"
"""What transformers calls the files that it looks for."""
OWN_STEM = "qcompile"
"""What we call files with codes, which it must not find."""
INDEX = ".safetensors.index.json"
DEFAULT_SHARD = "50GB"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", re.IGNORECASE)
_FILE = re.compile(r"[\w.-]*\.safetensors")
_FIX = "Fix: save the model again, or copy the file there"


def digest(tensor: Tensor) -> str:
    """The digest of a tensor on the CPU."""
    label = f"{tensor.dtype} {list(tensor.shape)}".encode()
    data = as_bytes(tensor.reshape(-1)).numpy().data if tensor.numel() else b""
    return f"{zlib.crc32(data, zlib.crc32(label)):08x}"


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of every tensor; several at a time, as zlib lets other threads run."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def size_in_bytes(size: int | str, name: str = "max_shard_size") -> int:
    """A size in bytes.

    Args:
        size: bytes, or a number with a unit: "5GB" (10^9 bytes), "200MiB" (2^20).
        name: of the argument, for the message.

    Raises:
        CheckpointError: it is no size.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else size
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{name}={size!r} is no size. Fix: bytes, or a text as '5GB'")
    return count


def write_tensors(tensors: Mapping[str, Tensor], work: Path, stem: str, size: int, metadata: dict[str, str]) -> str:
    """Write tensors to one file, or to several with an index.

    Args:
        tensors: on the CPU, contiguous, none with memory of another.
        work: the folder.
        stem: what the files' names begin with.
        size: the largest size of one file, in bytes; a tensor that is larger has a file of its own.
        metadata: of each file.

    Returns:
        The name of the file, or of the index.
    """
    shards = _shards(tensors, size)
    if len(shards) == 1:
        write_shard(shards[0], work / f"{stem}.safetensors", metadata)
        return f"{stem}.safetensors"
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(shard, work / name, metadata)
        places |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (work / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return f"{stem}{INDEX}"


def write_shard(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, tensor after tensor: a stored one is in memory while it is written.

    Args:
        tensors: on the CPU.
        file: to write.
        metadata: for its header.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    # Wide dtypes first, so that every tensor begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    first = 0
    for name in names:
        tensor = tensors[name]
        end = first + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
        first = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as raw:
        raw.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            write_values(raw, tensors[name])


def read_tensors(path: Path, expected: Mapping[str, str] | None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the files that an index names.

    Args:
        path: the file, or the index.
        expected: their digests; None for files that were written without.

    Raises:
        CheckpointError: a file is missing, truncated or no such file, or a tensor is not the one that was written.
    """
    tensors: dict[str, Tensor] = {}
    for file in files_of(path):
        with opened(file) as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  not a dict
    if expected is not None:
        require_digests(path, tensors, expected)
    return tensors


def read_named(files: list[Path], names: set[str]) -> dict[str, Tensor]:
    """Some tensors of safetensors files; a name that no file has is omitted.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with opened(file) as reader:
            found |= {name: reader.get_tensor(name) for name in names.intersection(reader.keys())}
    return found


def read_empty(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files without their content: name, shape and dtype, on the meta device.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with opened(file) as reader:
            for name in reader.keys():  # noqa: SIM118  not a dict
                part = reader.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    return found


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""What a header of safetensors calls a dtype."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


def _shards(tensors: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    if sum(tensor.nbytes for tensor in tensors.values()) <= size:
        return [dict(tensors)]
    try:
        from huggingface_hub import split_torch_state_dict_into_shards
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"the tensors do not fit into one file of {size} bytes, and huggingface_hub, which splits them, is not "
            "installed. Fix: pip install huggingface_hub, or a larger max_shard_size"
        ) from error
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=size)
    return [{name: tensors[name] for name in names} for names in split.filename_to_tensors.values()]


def files_of(path: Path) -> list[Path]:
    """The files behind a file or an index; an index names files of its own folder only."""
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be read (it is missing, or no file). {_FIX}")
    if not path.name.endswith(INDEX):
        return [path]
    try:
        places = read_json(path)["weight_map"]
        names = sorted(set(places.values()))
    except (DamagedJson, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files ({error}). {_FIX}") from error
    if not names or not all(isinstance(name, str) and _FILE.fullmatch(name) for name in names):
        raise CheckpointError(f"{path} names no safetensors files of its folder. {_FIX}")
    return [path.parent / name for name in names]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A reader of a safetensors file. Raises CheckpointError if it is missing, truncated or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be read (it is missing, or no file). {_FIX}")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except Exception as error:  # a reader of damaged bytes: its own errors, and those of what it calls
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} cannot be read ({reason}): it is truncated, damaged or foreign. Fix: save the model again"
        ) from error


def require_digests(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    """Check that tensors are those that were written.

    Args:
        path: of their file, for the message.
        tensors: as read.
        expected: their digests.

    Raises:
        CheckpointError: some are missing, unknown or changed.
    """
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} is not the file that was written: missing tensors {missing[:4]}, unknown ones {unknown[:4]}. "
            "Fix: save the model again, or restore the file from a copy"
        )
    changed = changed_tensors(tensors, expected)
    if changed:
        raise CheckpointError(
            f"{path} is damaged: {changed[:4]} ({len(changed)} of {len(tensors)} tensors) are not what was written. "
            "Fix: save the model again, or restore the file from a copy"
        )


def changed_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> list[str]:
    """The names of tensors, on the CPU, whose digest is another one."""
    found = digests(tensors)
    return [name for name in tensors if found[name] != expected[name]]
