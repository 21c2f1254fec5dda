"""One safetensors file, and a digest of every tensor in it.

A digest is the CRC-32 of dtype, shape and bytes: it finds every flipped bit and every run of up to 32 wrong bits, and
misses other damage once in 2^32. It is the fastest of what Python brings along (docs/guides/checkpoints.md has the
cost), and no defense against somebody who wants to deceive.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.memory.fingerprint import as_bytes


def digest(tensor: Tensor) -> str:
    """The digest of a tensor on the CPU."""
    label = f"{tensor.dtype} {list(tensor.shape)}".encode()
    data = as_bytes(tensor.reshape(-1)).numpy().data if tensor.numel() else b""
    return f"{zlib.crc32(data, zlib.crc32(label)):08x}"


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of every tensor; several at a time, as zlib lets other threads run."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def read_tensors(path: Path, expected: Mapping[str, str] | None) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Args:
        path: the file.
        expected: their digests; None for a file that was written without.

    Raises:
        CheckpointError: it is missing, truncated or no such file, or a tensor is not the one that was written.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} cannot be read (it is missing, or no file). Fix: save the model again, or copy the file there"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except Exception as error:  # a reader of damaged bytes: its own errors, and those of what it calls
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} cannot be read ({reason}): it is truncated, damaged or foreign. Fix: save the model again"
        ) from error
    if expected is not None:
        _compare(path, tensors, expected)
    return tensors


def _compare(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} is not the file that was written: missing tensors {missing[:4]}, unknown ones {unknown[:4]}. "
            "Fix: save the model again, or restore the file from a copy"
        )
    found = digests(tensors)
    changed = [name for name in tensors if found[name] != expected[name]]
    if changed:
        raise CheckpointError(
            f"{path} is damaged: {changed[:4]} ({len(changed)} of {len(tensors)} tensors) are not what was written. "
            "Fix: save the model again, or restore the file from a copy"
        )
