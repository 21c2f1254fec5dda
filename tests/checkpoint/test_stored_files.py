"""Tensors of safetensors files are read when they are needed, and a file that changes in between is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from qcompile.checkpoint import stored_files as module
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.stored_files import SMALL, read_part, safetensors_of, stored_tensors
from qcompile.memory.fingerprint import as_bytes
from qcompile.memory.stored_tensor import StoredTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool,
          torch.int32, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip


def test_every_dtype_and_shape_is_what_was_saved(tmp_path):
    tensors = {str(dtype): (torch.randn(3, 5) * 40).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "three": torch.randn(2, 3, 4)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {"format": "pt"})
    found = stored_tensors([file], small=0)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert isinstance(found[name], StoredTensor) == (tensor.nbytes > 0)
        values = found[name].read() if tensor.nbytes else found[name]
        assert values.dtype == tensor.dtype and values.shape == tensor.shape
        assert torch.equal(as_bytes(values), as_bytes(tensor))


def test_nothing_large_is_read_before_it_is_needed(tmp_path, monkeypatch):
    reads = []

    def counted(file, first, like):
        reads.append(like.nbytes)
        return read_part(file, first, like)

    monkeypatch.setattr(module, "read_part", counted)
    tensors = {"small": torch.randn(SMALL // 4), "large": torch.randn(SMALL // 4 + 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = stored_tensors([tmp_path / "x.safetensors"])
    assert reads == [SMALL] and torch.equal(found["small"], tensors["small"])
    assert type(found["small"]) is torch.Tensor and isinstance(found["large"], StoredTensor)
    assert torch.equal(found["large"].abs(), tensors["large"].abs()) and reads == [SMALL, SMALL + 4]


def test_several_files_are_one_model(tmp_path):
    tensors = {"a": torch.randn(4), "b": torch.randn(5)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    places = {name: f"{name}.safetensors" for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    files = safetensors_of(tmp_path)
    assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored_tensors(files).items())
    save_file(tensors, tmp_path / "model.safetensors")
    assert safetensors_of(tmp_path) == [tmp_path / "model.safetensors"], "one file comes first, as in transformers"


def test_a_folder_without_such_files_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no model.safetensors.*Fix: save the model by save_pretrained"):
        safetensors_of(tmp_path)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(100), "b": torch.randn(100)}, path)
    return path


def test_missing_and_truncated_files_are_refused_at_once(file):
    data = file.read_bytes()
    for kept in (data[:-4], data[:30], data[:4], b"", data + b"more"):
        file.write_bytes(kept)
        with pytest.raises(CheckpointError, match="x.safetensors cannot be read .*Fix: "):
            stored_tensors([file])
    file.unlink()
    with pytest.raises(CheckpointError, match="x.safetensors cannot be read .it is missing"):
        stored_tensors([file])


@pytest.mark.parametrize(
    "harm, reason",
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "ends after 392 of 400 bytes"),
    ],
)
def test_a_file_that_goes_or_shrinks_while_a_model_is_read_is_named(file, harm, reason):
    last = stored_tensors([file], small=0)["b"]
    harm(file)
    with pytest.raises(CheckpointError, match=f"x.safetensors cannot be read any more .*{reason}.*Fix: restore it"):
        last.abs()
