"""Shards, index and configuration of a served folder."""

from __future__ import annotations

import json

import pytest
import torch
from served_models import quantized

from qcompile.checkpoint.writers import served_folder
from qcompile.checkpoint.writers.compressed_tensors_layout import TARGET, compressed_layout
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.checkpoint.writers.served_folder import ServedLayout, write_served_folder
from qcompile.checkpoint.writers.shard_reader import ShardReader


def test_shards_have_an_index_and_config_json_says_how_to_read_them(tmp_path):
    model = quantized("int4/group32/bf16", dtype=torch.bfloat16)
    tensors, config, _ = compressed_layout(model)
    layout = ServedLayout(TARGET, tensors, config, {"more.json": {"a": 1}})
    write_served_folder(model, layout, tmp_path, None, 20_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) >= 5 and set(index["weight_map"]) == ShardReader(tmp_path).files.keys()
    assert {path.stat().st_mode & 0o777 for path in shards} == {0o644}
    read = json.loads((tmp_path / "config.json").read_text())
    assert read["quantization_config"] == config and read["dtype"] == "bfloat16"
    assert read["architectures"] == [type(model).__name__]
    assert json.loads((tmp_path / "more.json").read_text()) == {"a": 1}


def test_a_file_that_is_not_what_was_written_is_noticed(tmp_path, monkeypatch):
    model = quantized("int8/row")
    tensors, config, _ = compressed_layout(model)
    read = ShardReader.tensor

    def damaged(self, name):
        return read(self, name) + (name == "model.norm.weight")

    monkeypatch.setattr(served_folder.ShardReader, "tensor", damaged)
    with pytest.raises(ExportError, match="model.norm.weight is not what was written"):
        write_served_folder(model, ServedLayout(TARGET, tensors, config), tmp_path, None, "5GB")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    model = quantized("int8/row")
    tensors = {"model.norm.weight": torch.zeros(1)}
    with pytest.raises(ExportError, match="model.norm.weight is the name of codes and of a float tensor"):
        write_served_folder(model, ServedLayout(TARGET, tensors, {}), tmp_path, None, "5GB")
