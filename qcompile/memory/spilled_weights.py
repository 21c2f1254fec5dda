"""Weights that live in files: what a pass gives a new value is written to a folder, and read when it is needed."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompile.memory.stored_tensor import StoredTensor
from qcompile.memory.tensor_bytes import read_values, write_values

SMALL = 1 << 16
"""Bytes of a tensor that stays in memory: norms, biases, scales of a small site."""


_FILES = itertools.count()  # several may use one folder


class SpillFolder:
    """A folder of tensors that are too many for memory; a file goes with the last tensor that reads it.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """Use a folder that exists, or a new temporary one, which goes with the last tensor in it."""
        self.path = Path(path or tempfile.mkdtemp(prefix="qcompile-"))
        if path is None:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def spill(self, tensor: Tensor) -> Tensor:
        """A stored tensor of the same values on the same device; the tensor itself if it is small or stored already.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.nbytes <= SMALL or tensor.is_meta:
            return tensor
        file = self.path / f"{os.getpid()}-{next(_FILES)}.bin"
        try:
            with file.open("xb", buffering=0) as raw:
                write_values(raw, tensor.cpu())
        except OSError as error:
            file.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free
            raise OSError(
                error.errno, f"{tensor.nbytes / 1e6:.0f} MB do not fit, {free / 1e6:.0f} MB are free", str(self.path)
            ) from error
        like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        spilled = StoredTensor(like, functools.partial(_read, self, file, like), tensor.device)
        weakref.finalize(spilled._read, file.unlink, missing_ok=True)
        return spilled


class SpilledWeights(dict[str, Tensor]):
    """Weights by name; large ones that are assigned go to a folder."""

    def __init__(self, weights: Mapping[str, Tensor], folder: SpillFolder) -> None:
        super().__init__(weights)
        self.folder = folder

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, self.folder.spill(tensor))

    def copy(self) -> SpilledWeights:
        """Another mapping of the same tensors and folder."""
        return SpilledWeights(self, self.folder)


def _read(folder: SpillFolder, file: Path, like: Tensor) -> Tensor:
    """The values of a file; the folder is named because it must exist as long."""
    with file.open("rb", buffering=0) as raw:
        return read_values(raw, like)
