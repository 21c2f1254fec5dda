"""Reading single tensors of a folder of safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class ShardReader:
    """The tensors of all safetensors files of a folder by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises KeyError if no file has it."""
        with safe_open(str(self.files[name]), framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found
