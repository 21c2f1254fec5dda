"""The bytes of a tensor, to and from an open file: of any length, where one call of the system moves 2 GB at most."""

from __future__ import annotations

from io import FileIO

import torch
from torch import Tensor

from qcompile.memory.fingerprint import as_bytes


def read_values(raw: FileIO, like: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `like` from where a file stands.

    Raises:
        EOFError: the file ends before; the text says after how many bytes.
    """
    data = torch.empty(like.nbytes, dtype=torch.uint8)
    view, count = data.numpy().data, 0
    while count < len(view):
        got = raw.readinto(view[count:])
        if not got:
            raise EOFError(f"the file ends after {count} of {len(view)} bytes")
        count += got
    return data.view(like.dtype).view(like.shape)


def write_values(raw: FileIO, tensor: Tensor) -> None:
    """Write the values of a tensor on the CPU, row-major. Raises OSError, as of a full disk."""
    view = as_bytes(tensor).numpy().data if tensor.numel() else memoryview(b"")
    while view:
        view = view[raw.write(view) or 0 :]
