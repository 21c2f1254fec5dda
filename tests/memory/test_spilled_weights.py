"""Weights that a pass rewrites go to files, one file for each, which goes with the last tensor that reads it."""

from __future__ import annotations

import errno
import gc

import pytest
import torch
from torch import nn

from qcompile.memory import spilled_weights as module
from qcompile.memory.spilled_weights import SMALL, SpilledWeights, SpillFolder
from qcompile.memory.stored_tensor import StoredTensor

LARGE = SMALL // 4 + 1  # values of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_values_come_back_bit_for_bit(dtype, tmp_path):
    tensor = (torch.randn(3, 4 * LARGE) * 20).to(dtype)
    folder = SpillFolder(tmp_path)
    found = folder.spill(tensor)
    assert isinstance(found, StoredTensor) and found.shape == tensor.shape and torch.equal(found.read(), tensor)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == tensor.nbytes
    other = folder.spill(tensor.t())
    assert torch.equal(other.read(), tensor.t()) and other.is_contiguous()


def test_small_tensors_stored_ones_and_other_devices_stay(tmp_path):
    folder = SpillFolder(tmp_path)
    small = torch.zeros(SMALL // 4)
    stored = folder.spill(torch.zeros(LARGE))
    elsewhere = torch.empty(LARGE, device="meta")
    for tensor in (small, stored, elsewhere):
        assert folder.spill(tensor) is tensor
    assert len(list(tmp_path.iterdir())) == 1
    assert isinstance(folder.spill(nn.Parameter(torch.zeros(LARGE), requires_grad=False)), StoredTensor)


def test_a_file_goes_with_the_last_tensor_that_reads_it(tmp_path):
    first = SpillFolder(tmp_path).spill(torch.randn(2, LARGE))
    second = first[1].to(torch.float64)
    plain = first.read()[1].double()
    del first
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1 and torch.equal(second.read(), plain)
    StoredTensor(torch.ones(1), lambda: torch.ones(1)).read()  # what was read last is kept no longer
    del second
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_goes_with_the_last_tensor_in_it():
    folder = SpillFolder()
    path, tensor = folder.path, folder.spill(torch.randn(LARGE))
    del folder
    gc.collect()
    assert path.is_dir() and tensor.read().shape == (LARGE,)
    StoredTensor(torch.ones(1), lambda: torch.ones(1)).read()
    del tensor
    gc.collect()
    assert not path.exists()


def test_a_mapping_spills_what_is_assigned(tmp_path):
    whole, new, small = torch.randn(LARGE), torch.randn(LARGE), torch.ones(3)
    weights = SpilledWeights({"a": whole}, SpillFolder(tmp_path))
    assert weights["a"] is whole and not list(tmp_path.iterdir())
    weights["a"], weights["b"] = new, small
    assert isinstance(weights["a"], StoredTensor) and torch.equal(weights["a"].read(), new) and weights["b"] is small
    copied = weights.copy()
    assert isinstance(copied, SpilledWeights) and copied == weights
    copied["a"] = whole
    assert torch.equal(weights["a"].read(), new) and torch.equal(copied["a"].read(), whole)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(raw, tensor):
        raw.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    weights = SpilledWeights({}, SpillFolder(tmp_path))
    monkeypatch.setattr(module, "write_values", full)
    with pytest.raises(OSError, match=r"2 MB do not fit, \d+ MB are free") as caught:
        weights["a"] = torch.zeros(500_000)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert not list(tmp_path.iterdir()) and not weights
