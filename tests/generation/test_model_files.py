"""Damaged and foreign files of float models end in a sentence before transformers reads them."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from qcompile.generation.model_files import DamagedFile, check_files, check_gguf, check_sizes


def gguf(pairs=(), tensors=(), version=3, count=None):
    """The bytes of a GGUF file: (name, type, bytes of the value), (name, dims, offset)."""
    text = lambda name: struct.pack("<Q", len(name)) + name.encode()  # noqa: E731
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs) if count is None else count)
    for name, kind, value in pairs:
        out += text(name) + struct.pack("<I", kind) + value
    for name, dims, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)
    return out + bytes(256)


STRINGS = struct.pack("<IQ", 8, 2) + (struct.pack("<Q", 1) + b"a") * 2
GOOD = [("n", 4, struct.pack("<I", 7)), ("s", 8, struct.pack("<Q", 2) + b"ab"), ("l", 9, STRINGS),
        ("f", 9, struct.pack("<IQ", 6, 3) + bytes(12))]  # fmt: skip


def test_a_whole_header_passes(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf(GOOD, [("w", (4, 8), 0), ("b", (), 32)]))
    assert check_gguf(tmp_path / "x.gguf") == 4 * 8 + 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"NOPE" + gguf()[4:],
        gguf(version=9),
        gguf(GOOD)[:60],
        gguf(GOOD, count=2**60),
        gguf([("s", 8, struct.pack("<Q", 2**63))]),
        gguf([("l", 9, struct.pack("<IQ", 8, 2**60))]),
        gguf([("l", 9, struct.pack("<IQ", 4, 2**60))]),
        gguf([("l", 9, struct.pack("<IQ", 9, 1) + STRINGS)]),
        gguf([("n", 77, b"")]),
        gguf((), [("w", (2**60, 2**60), 0)]),
        gguf((), [("w", (4,), 2**50)]),
        gguf((), [("w", (1,) * 9, 0)]),
    ],
)
def test_lengths_outside_the_file_are_refused(content, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(DamagedFile, match="x.gguf is no GGUF file, or damaged in its header"):
        check_gguf(tmp_path / "x.gguf")


def folder(path, config=None, **tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["M"], **(config or {})}))
    save_file(tensors or {"w": torch.ones(4, 4)}, path / "model.safetensors", {"format": "pt"})
    return path


def test_a_folder_of_transformers_passes(tmp_path):
    check_files(folder(tmp_path / "m"))


def test_files_that_transformers_does_not_read_may_hold_anything(tmp_path):
    """Sentence encoders come with lists of data sets and modules."""
    root = folder(tmp_path / "m")
    (root / "data_config.json").write_text("[1]")
    (root / "notes.json").write_text("none")
    check_files(root)


def test_other_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, words in (("file", "is a file"), ("empty", "the folder is empty"), (".", "holds no config.json")):
        with pytest.raises(DamagedFile, match=words):
            check_files(tmp_path / name)
    (tmp_path / "empty/model.onnx").write_text("")
    with pytest.raises(DamagedFile, match="exported ONNX folder"):
        check_files(tmp_path / "empty")
    with pytest.raises(DamagedFile, match="its qcompile.json is missing"):
        check_files(folder(tmp_path / "ours", {"quantization_config": {"quant_method": "qcompile"}}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"[" * 100_000, "nests too deeply"),
        ("config.json", b"[]", "holds no JSON object"),
        ("config.json", b'{"architectures": "M"}', "names the architectures 'M'"),
        ("config.json", b'{"architectures": [3]}', "names the architectures"),
        ("tokenizer.json", b"\xff", "tokenizer.json is damaged"),
        ("generation_config.json", b'{"a": NaN}', "NaN is no JSON"),
        ("model.safetensors", b"abc", "model.safetensors cannot be read"),
        ("model-2.safetensors", b"\xff" * 40, "model-2.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_named(name, content, words, tmp_path):
    root = folder(tmp_path / "m")
    (root / name).write_bytes(content)
    with pytest.raises(DamagedFile, match=words):
        check_files(root)


class Config:
    quantization_config = None

    def __init__(self, layers, size):
        self.num_hidden_layers, self.size = layers, size

    def get_text_config(self):
        return self


def test_a_configuration_far_beyond_the_files_is_refused_before_it_is_built(tmp_path):
    root, model = folder(tmp_path / "m"), lambda config: torch.nn.Linear(config.size, config.size)
    check_sizes(root, model, Config(1, 4))
    with pytest.raises(DamagedFile, match="says 1000000000 layers, and the files hold 1 tensors"):
        check_sizes(root, model, Config(10**9, 4))
    with pytest.raises(DamagedFile, match="describes 1000000001000000 parameters, and the files hold 16 values"):
        check_sizes(root, lambda config: torch.nn.Linear(10**9, 10**6), Config(1, 4))
