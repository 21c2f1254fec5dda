"""Files of float models, checked before transformers reads them: it would loop or fill memory on some damaged ones."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qcompile.recipe.strict_json import DamagedJson, read_json

_LOOSE = 4  # parameters of a configuration for each value in the files: tied ones are stored once
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's types of values
_STRING, _ARRAY = 8, 9
# What transformers reads, each an object; people keep other files of any form beside them.
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
    "adapter_config.json", "*.index.json",
)  # fmt: skip


class DamagedFile(ValueError):
    """A file that cannot be read; the text names it and what is wrong."""


def check_files(folder: Path) -> None:
    """Check that a folder is one of a float model of transformers, and that its files can be read.

    Raises:
        DamagedFile: it is something else, or a file is damaged.
    """
    if not folder.is_dir():
        raise DamagedFile("it is a file, and no .gguf file")
    if (folder / "model.onnx").is_file() and not list(folder.glob("*.safetensors")):
        raise DamagedFile("it is an exported ONNX folder, which `qcompile generate` runs")
    if not (folder / "config.json").is_file():
        raise DamagedFile("it holds no config.json" if any(folder.iterdir()) else "the folder is empty")
    for path in sorted(path for name in _OBJECTS for path in folder.glob(name)):
        _require_object(path)
    config = read_json(folder / "config.json")
    if (config.get("quantization_config") or {}).get("quant_method") == "qcompile":
        raise DamagedFile("it was written by qcompile.save, and its qcompile.json is missing")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DamagedFile(f"config.json names the architectures {names!r}, which are no list of names")
    for path in sorted(folder.glob("*.safetensors")):
        _elements(path)


def check_sizes(folder: Path, cls: Any, config: Any) -> None:
    """Check that a configuration is not far larger than what the files hold: it would be built before it is refused.

    Args:
        folder: of safetensors files; others are not checked.
        cls: the class that will be built; an Auto class too.
        config: the configuration.

    Raises:
        DamagedFile: it is.
    """
    files = [_elements(path) for path in sorted(folder.glob("*.safetensors"))]
    if not files or getattr(config, "quantization_config", None) is not None:
        return
    tensors, elements = (sum(counts) for counts in zip(*files, strict=True))
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        raise DamagedFile(f"config.json says {layers} layers, and the files hold {tensors} tensors")
    with torch.device("meta"):
        built = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    if parameters > _LOOSE * elements + 2**20:
        raise DamagedFile(f"config.json describes {parameters} parameters, and the files hold {elements} values")


def check_gguf(path: Path) -> int:
    """Check the header of a GGUF file: that every length in it lies inside the file.

    Returns:
        How many values its tensors have.

    Raises:
        DamagedFile: it does not.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Gguf(mapped).check()
    except (struct.error, ValueError, OSError) as error:  # ValueError: an empty file, or as DamagedFile
        raise DamagedFile(
            f"{path} is no GGUF file, or damaged in its header ({error}). Fix: copy or download it again"
        ) from error


class _Gguf:
    """A walk through the header of a GGUF file, whose integers are little-endian."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), 0

    def check(self) -> int:
        if self.data[:4] != b"GGUF":
            raise DamagedFile("it does not begin with GGUF")
        self.at = 4
        version = self._integer("<I")
        if version not in (2, 3):
            raise DamagedFile(f"version {version} is unknown")
        tensors, pairs = self._integer("<Q"), self._integer("<Q")
        for _ in range(pairs):  # each takes bytes of the file, or raises
            self._skip_string()
            self._skip_value(self._integer("<I"), tensors)
        values = 0
        for _ in range(tensors):
            self._skip_string()
            dims = self._integer("<I")
            if dims > 8:
                raise DamagedFile(f"a tensor has {dims} dimensions")
            elements = 1
            for _ in range(dims):
                elements *= self._integer("<Q")
            self._skip(4)
            offset = self._integer("<Q")
            if elements > 8 * self.size or offset > self.size:
                raise DamagedFile("a tensor lies outside the file")
            values += elements
        return values

    def _integer(self, layout: str) -> int:
        value: int = struct.unpack_from(layout, self.data, self.at)[0]
        self.at += struct.calcsize(layout)
        return value

    def _skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise DamagedFile(f"{count} bytes are needed at byte {self.at}, and the file ends before")
        self.at += count

    def _skip_string(self) -> None:
        self._skip(self._integer("<Q"))

    def _skip_value(self, kind: int, tensors: int, depth: int = 0) -> None:
        if kind in _WIDTHS:
            self._skip(_WIDTHS[kind])
        elif kind == _STRING:
            self._skip_string()
        elif kind == _ARRAY and not depth:
            of, count = self._integer("<I"), self._integer("<Q")
            if of in _WIDTHS:
                self._skip(count * _WIDTHS[of])
            else:
                for _ in range(count):
                    self._skip_value(of, tensors, 1)
        else:
            raise DamagedFile(f"a value has the unknown type {kind}")


def _require_object(path: Path) -> None:
    try:
        if not isinstance(read_json(path), dict):
            raise DamagedFile(f"{path} holds no JSON object")
    except DamagedJson as error:
        raise DamagedFile(f"{error}. Fix: copy or download it again") from error


def _elements(path: Path) -> tuple[int, int]:
    """How many tensors, and how many values, a safetensors file holds; of its header only."""
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise DamagedFile(
            f"{path} cannot be read ({error}): it is truncated or damaged. Fix: copy or download it again"
        ) from error
    return len(shapes), sum(torch.Size(shape).numel() for shape in shapes)
