"""Digests tell every changed tensor, and damaged files end in one line."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.tensor_file import digest, digests, read_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool,
          torch.float8_e4m3fn]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_of_bytes_shape_and_dtype(dtype):
    tensor = torch.arange(24).reshape(4, 6).to(dtype)
    assert digest(tensor) == digest(tensor.clone()) == digest(tensor.t().contiguous().t())
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[7] ^= 1
    different = {digest(t) for t in (tensor, other, tensor.reshape(6, 4), tensor.view(torch.uint8))}
    assert len(different) == (3 if dtype == torch.uint8 else 4)


def test_scalars_and_empty_tensors_have_digests():
    assert len({digest(torch.tensor(1.0)), digest(torch.ones(1)), digest(torch.ones(0)), digest(torch.ones(0, 2))}) == 4


def test_a_changed_missing_or_new_tensor_is_named(tmp_path):
    tensors = {"a": torch.randn(4, 4), "b": torch.randn(3)}
    path, expected = tmp_path / "x.safetensors", digests(tensors)
    save_file(tensors, path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in read_tensors(path, expected).items())
    save_file({**tensors, "b": tensors["b"] * 2}, path)
    assert read_tensors(path, None).keys() == tensors.keys()
    with pytest.raises(CheckpointError, match=r"x.safetensors is damaged: \['b'\] \(1 of 2 tensors\)"):
        read_tensors(path, expected)
    save_file({"a": tensors["a"], "c": tensors["b"]}, path)
    with pytest.raises(CheckpointError, match=r"missing tensors \['b'\], unknown ones \['c'\]"):
        read_tensors(path, expected)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 16, b"\x10" + bytes(7) + b"[" * 16, b"\x02" + bytes(7) + b"{}x"]
)
def test_damaged_files_end_in_one_line(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="x.safetensors cannot be read .*Fix: save") as caught:
        read_tensors(path, None)
    assert "\n" not in str(caught.value)


def test_no_file_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        with pytest.raises(CheckpointError, match="cannot be read .it is missing, or no file"):
            read_tensors(tmp_path / name, None)
