"""The proof of a written folder notices codes, scales and schemes that are not the model's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from served_models import quantized

import qcompile
from qcompile.checkpoint.writers.compressed_tensors_layout import compressed_layout
from qcompile.checkpoint.writers.compressed_tensors_proof import can_reopen, prove_compressed, require_same
from qcompile.checkpoint.writers.export_refusals import ExportError

PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = quantized("int4/group32/zero")
    folder = tmp_path_factory.mktemp("proof") / "out"
    qcompile.export(model, folder, progress=False)
    return model, folder, compressed_layout(model)[2]


def test_what_was_written_is_proved(written):
    assert can_reopen() and prove_compressed(written[1], written[0], written[2]) == 7


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_one_flipped_value_is_noticed(written, tmp_path, part):
    model, folder, schemes = written
    tensors = load_file(folder / "model.safetensors")
    changed = tensors[f"{PATH}.{part}"]
    changed[-1, -1] = changed[-1, -1] * 2 if part == "weight_scale" else changed[-1, -1] ^ 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ExportError, match=f"{PATH}: compressed-tensors reads weights .* that differ by"):
        prove_compressed(tmp_path, model, schemes)


def test_a_config_that_says_otherwise_is_noticed(written, tmp_path):
    model, folder, schemes = written
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="lm_head: compressed-tensors reads"):
        prove_compressed(tmp_path, model, schemes)


def test_weights_are_compared_in_the_dtype_that_was_read():
    ours = torch.tensor([[1.0, 1.0 + 2**-12]])
    require_same("a", ours.bfloat16(), ours, "a reader")
    with pytest.raises(ExportError, match="a: a reader reads weights"):
        require_same("a", ours.bfloat16().float(), ours, "a reader")
    with pytest.raises(ExportError):
        require_same("a", ours[0], ours, "a reader")
