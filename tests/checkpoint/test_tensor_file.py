"""Digests tell every changed tensor, and damaged files end in one line."""

from __future__ import annotations

import json
import os
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.tensor_file import (
    digest,
    digests,
    read_empty,
    read_named,
    read_tensors,
    size_in_bytes,
    write_shard,
    write_tensors,
)
from qcompile.memory.stored_tensor import StoredTensor

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


TENSORS = {"a": torch.randn(4, 4), "b": torch.randn(3), "c": torch.randn(100), "d": torch.zeros(0)}


def test_a_file_holds_what_fits_or_one_larger_tensor(tmp_path):
    name = write_tensors(TENSORS, tmp_path, "model", 80, {"format": "pt"})
    assert name == "model.safetensors.index.json"
    index = json.loads((tmp_path / name).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
    assert index["weight_map"].keys() == TENSORS.keys()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file in files:
        inside = [key for key, place in index["weight_map"].items() if place == file.name]
        assert read_empty([file]).keys() == set(inside)
        assert sum(TENSORS[key].nbytes for key in inside) <= 80 or inside == ["c"]
    read = read_tensors(tmp_path / name, digests(TENSORS))
    assert all(torch.equal(read[key], tensor) for key, tensor in TENSORS.items())
    assert read_named(files, {"b", "unknown"}).keys() == {"b"}
    empty = read_empty(files)
    assert {n: (t.shape, t.dtype, t.is_meta) for n, t in empty.items()} == {
        n: (t.shape, t.dtype, True) for n, t in TENSORS.items()
    }


def test_without_the_library_that_splits_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="80 bytes.*Fix: pip install huggingface_hub"):
        write_tensors(TENSORS, tmp_path, "model", 80, {})
    assert not list(tmp_path.iterdir())
    assert write_tensors(TENSORS, tmp_path, "model", 10_000, {}) == "model.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_an_empty_tensor(dtype, tmp_path):
    save_file({"a": torch.zeros(2, 3).to(dtype)}, tmp_path / "x.safetensors")
    assert read_empty([tmp_path / "x.safetensors"])["a"].dtype == dtype


@pytest.mark.parametrize(
    "text, count", [(7, 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("1TB", 10**12)]
)
def test_sizes(text, count):
    assert size_in_bytes(text) == count


@pytest.mark.parametrize("size", [0, -1, 1.5, "", "5", "GB", "5 bytes", None, True, "0KB"])
def test_what_is_no_size(size):
    with pytest.raises(CheckpointError, match="is no size. Fix: bytes, or a text as '5GB'"):
        size_in_bytes(size)


@pytest.mark.parametrize(
    "index, words",
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "names no safetensors files of its folder"),
        ({"weight_map": {"a": 3}}, "names no safetensors files of its folder"),
        ({"weight_map": {}}, "names no safetensors files of its folder"),
        ({"weight_map": 3}, "is no index"),
        ({}, "is no index"),
        ([], "is no index"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors cannot be read"),
    ],
)
def test_a_damaged_index_ends_in_one_line(index, words, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_tensors(path, None)
    assert "Fix: " in str(caught.value) and "\n" not in str(caught.value)


STORED = [*DTYPES, torch.int32, torch.int16, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


@given(st.lists(st.tuples(st.sampled_from(STORED), st.lists(st.integers(0, 3), max_size=3)), max_size=8), st.data())
def test_the_library_reads_what_is_written(tmp_path_factory, entries, data):
    """Any dtypes and shapes, stored tensors and transposed ones, each at a multiple of its element's size."""
    tensors, given_tensors = {}, {}
    for index, (dtype, shape) in enumerate(entries):
        tensor = (torch.rand(shape) * 90).to(torch.int32).to(dtype)
        kind = data.draw(st.sampled_from(["plain", "stored", "transposed"]))
        name = f"layers.{index}.\u00e9"
        tensors[name] = tensor.t().contiguous() if kind == "transposed" and tensor.ndim == 2 else tensor
        given_tensors[name] = (
            StoredTensor(tensor, tensor.clone)
            if kind == "stored"
            else tensor.t()
            if kind == "transposed" and tensor.ndim == 2
            else tensor
        )
    file = tmp_path_factory.mktemp("shard") / "x.safetensors"
    write_shard(given_tensors, file, {"format": "pt", "note": "\u00e9"} if entries else {})
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert digest(found[name]) == digest(tensor)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__", None) == ({"format": "pt", "note": "\u00e9"} if entries else None)
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        assert first % max(1, tensors[name].element_size()) == 0 and end - first == tensors[name].nbytes


def test_a_stored_tensor_is_read_while_it_is_written_and_not_before(tmp_path):
    alive, most = [], []

    def stored(seed):
        def read():
            tensor = torch.full((1000,), float(seed))
            alive.append(weakref.ref(tensor))
            most.append(sum(ref() is not None for ref in alive))
            return tensor

        return StoredTensor(torch.empty(1000), read)

    write_shard({str(seed): stored(seed) for seed in range(6)}, tmp_path / "x.safetensors", {})
    assert max(most) <= 2, "the last one that was read, and the one that is being written"
    assert all(float(t[0]) == int(name) for name, t in load_file(tmp_path / "x.safetensors").items())
