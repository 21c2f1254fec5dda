"""The model card: formats, lines that load the folder, and what readers do otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from served_models import decoder, ids, quantized

import qcompile
from qcompile.checkpoint.writers.model_card import caveats, write_card
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report


def card(model, work, target="compressed-tensors"):
    write_card(work, Path("some/out"), model, Report("served"), target)
    assert (work / "qcompile-report.json").is_file()
    return (work / "README.md").read_text()


def test_it_names_formats_and_the_lines_that_load(tmp_path):
    text = card(quantized("int4/group32/bf16", dtype=torch.bfloat16), tmp_path)
    assert "- 7 x weight int4/group32/bf16, activation float" in text and "# out\n" in text
    assert "vllm serve out" in text and 'AutoModelForCausalLM.from_pretrained("out")' in text
    assert "What to know" not in text and "recipe served: 0 of 0 sites" in text


def test_zero_points_say_how_transformers_reads_them(tmp_path):
    assert "CompressedTensorsConfig(dequantize=True)" in card(quantized("int4/group32/zero"), tmp_path)


def test_a_program_has_the_lines_that_run_it(tmp_path):
    text = card(quantized("int8/row", "int8/row/zero"), tmp_path, "executorch")
    assert 'load_program("out/model.pte")' in text and "library_name: executorch" in text
    assert "from_pretrained" not in text and "vllm" not in text and "What to know" not in text


def test_scales_of_a_cache_say_who_reads_them():
    model = decoder()
    config = QuantizeKV(8, static=True, fp8="tensor")
    quantize = Quantize("int4/group32", None, keep_lm_head=True)
    qcompile.quantize(model, Recipe("kv", (config, quantize, Fuse())), [ids()], progress=False)
    assert [note for note in caveats(model, "compressed-tensors") if "5.24" in note and "cache float" in note]
    assert not [note for note in caveats(quantized("int4/group32"), "compressed-tensors") if "cache" in note]


@pytest.mark.parametrize(
    "weight, act, dtype, words",
    [
        ("int8/row/bf16", "int8/row", torch.bfloat16, ["max / 127.5"]),
        ("int8/row", "int8/row", torch.bfloat16, ["max / 127.5", "Scales are float32"]),
        ("int4/group32", "int8/row", torch.float32, ["max / 127.5", "compute W4A16"]),
        ("int4/group128", "fp8/row", torch.float32, ["compute capability 9.0"]),
        ("fp8/row/bf16", "fp8/row", torch.bfloat16, []),
        ("int4/group32", None, torch.float32, []),
    ],
)
def test_each_difference_is_said(weight, act, dtype, words):
    found = caveats(quantized(weight, act, dtype), "compressed-tensors")
    assert len(found) == len(words) and all(w in note for w, note in zip(words, found, strict=True)), found
