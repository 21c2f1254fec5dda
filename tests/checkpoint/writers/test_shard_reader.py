"""Single tensors of a folder of safetensors files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from qcompile.checkpoint.writers.shard_reader import ShardReader


def test_tensors_of_all_files_are_found_by_name(tmp_path):
    save_file({"a": torch.arange(3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(2), "c": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    reader = ShardReader(tmp_path)
    assert reader.files.keys() == {"a", "b", "c"} and reader.tensor("a").tolist() == [0, 1, 2]
    assert reader.tensor("b").tolist() == [1, 1]
    with pytest.raises(KeyError):
        reader.tensor("d")
