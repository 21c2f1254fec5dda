"""`qcompile export`: names of programs, and what it hands to `qcompile.export`."""

from __future__ import annotations

import json

from qcompile.api import export_model


def test_a_folder_for_vllm_is_written(folder, tmp_path, call):
    out = call("export", folder, tmp_path / "o", "--to", "vllm", "--recipe", "serve-fp8", "--dtype", "float32")
    assert "weights read back by compressed-tensors, equal bit for bit" in out and "written:" in out
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    assert (tmp_path / "o/tokenizer.json").is_file()


def test_what_reaches_the_exporter(folder, tmp_path, call, monkeypatch):
    passed = []
    monkeypatch.setattr(export_model, "export", lambda *arguments, **options: passed.append((arguments, options)))
    template = tmp_path / "t.gguf"
    call("export", folder, tmp_path / "o", "--to", "llama.cpp", "-r", "gguf-q8_0", "--template", template)
    ((arguments, options),) = passed
    assert arguments[2:] == ("gguf-q8_0", None)
    assert options["to"] == "gguf" and options["template"] == template and options["tokenizer"] is not None


def test_the_length_of_a_program_reaches_the_exporter(folder, tmp_path, call, monkeypatch):
    passed = []
    monkeypatch.setattr(export_model, "export", lambda *arguments, **options: passed.append(options))
    call("export", folder, tmp_path / "o.pte", "--to", "executorch", "-r", "int8-zero", "--length", 32)
    assert passed[0]["to"] == "executorch" and passed[0]["length"] == 32


def test_an_unknown_target_is_refused_before_a_model_is_loaded(tmp_path, fail):
    line = fail("export", "no/such/model", tmp_path / "o", "--to", "tensorrt")
    assert "export to 'tensorrt' is unknown. Fix: use one of compressed-tensors, gguf, executorch, gptq, awq" in line


def test_a_folder_that_was_quantized_needs_no_recipe(folder, tmp_path, call):
    call("quantize", folder, tmp_path / "q", "--recipe", "fp8")
    out = call("export", tmp_path / "q", tmp_path / "o", "--to", "transformers")
    assert "recipe fp8: 15 of 15 sites" in out and "15 weights read back" in out
    assert (tmp_path / "o/tokenizer.json").is_file()
