"""`qcompile quantize` and `qcompile export-onnx`, end to end on a tiny local model."""

from __future__ import annotations

import dataclasses

import pytest

from qcompile.api import export_onnx
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.recipe.recipe import RecipeError


@pytest.mark.slow
def test_quantize_writes_a_model_that_the_others_read(folder, tmp_path, call):
    report = tmp_path / "q.html"
    assert "15 of 15 sites" in call("quantize", folder, tmp_path / "q", "--recipe", "w4a8", "--report", report)
    assert "15 of 15</b>" in report.read_text()
    assert "perplexity" in call("eval", tmp_path / "q", "--windows", 1, "--length", 64)
    assert "the" in call("generate", tmp_path / "q", "--prompt", "the", "--tokens", 3)


@pytest.mark.slow
def test_quantize_calibrates_on_a_data_set(folder, tmp_path, call, fail):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the of a is in to and the a of the is"}\n' * 60)
    out = call("quantize", folder, tmp_path / "q", "--recipe", "w4a16-gptq", "--data", rows)
    assert "recipe w4a16-gptq: 15 of 15 sites" in out
    arguments = "quantize", folder, tmp_path / "r", "--recipe", "w4a16-gptq", "--data"
    rows.write_text('{"prompt": "the"}\n')
    assert "has the columns 'prompt', and none is 'messages' or 'text'" in fail(*arguments, rows)
    rows.write_text('{"messages": [{"role": "user", "content": "the"}]}\n')
    assert "this tokenizer no chat template. Fix: give rows with 'text'" in fail(*arguments, rows)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("flags, name", [(("--resume",), "--resume"), (("--memory", "1GB"), "--memory")])
def test_flags_of_folders_in_parts_are_refused_elsewhere(folder, tmp_path, fail, flags, name):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for model, out in (("embedded", "q"), (tmp_path / "bin", "q"), (tmp_path / "x.gguf", "q.gguf")):
        error = fail("quantize", model, tmp_path / out, "-r", "int8", *flags)
        assert error == f"error: {name} goes with safetensors or GGUF files, and {model} is in none. Fix: drop it"
    assert "is no size" in fail("quantize", folder, tmp_path / "q", "-r", "int8", "--memory", "much")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "x.gguf"]


def test_a_device_that_is_not_there_is_refused_before_the_model_is_read(folder, tmp_path, fail):
    for model in (folder, "embedded"):
        line = fail("quantize", model, tmp_path / "q", "-r", "int8", "--device", "nowhere")
        assert line.startswith("error: device 'nowhere' is not there: ") and line.endswith(
            "Fix: another device, or none"
        )
    assert not list(tmp_path.iterdir())


def test_auto_takes_a_preset(folder, tmp_path, call):
    assert "15 of 15 sites" in call("quantize", folder, tmp_path / "auto", "--recipe", "auto")


def test_every_option_of_a_file_is_a_flag(call):
    out = " ".join(call("export-onnx", "--help").split())
    for field in dataclasses.fields(OnnxOptions):
        assert f"--{field.name.replace('_', '-')}" in out
    assert "--no-contrib-ops" in out


def test_the_flags_reach_the_exporter(folder, tmp_path, call, monkeypatch):
    passed = []
    monkeypatch.setattr(export_onnx, "export_onnx", lambda *arguments, **options: passed.append(options))
    flags = ["--no-contrib-ops", "--chunk", 64, "--float-cache", "--low-memory"]
    call("export-onnx", folder, tmp_path / "o", "--recipe", "int8", *flags)
    assert passed[0]["example"] is None and passed[0]["tokenizer"] is not None
    chosen = OnnxOptions(contrib_ops=False, chunk=64, float_cache=True, low_memory=True)
    assert {name: passed[0][name] for name in dataclasses.asdict(chosen)} == dataclasses.asdict(chosen)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--accuracy-level", 2], "accuracy_level 2 is unknown"),
        (["--no-contrib-ops", "--accuracy-level", 1], "standard operators only"),
        (["--pooling", "mean", "--last-logits"], "last_logits is for decoders"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(flags, words, tmp_path, call):
    with pytest.raises(RecipeError, match=words):
        call("export-onnx", "no/such/model", tmp_path / "o", *flags)


def test_a_package_is_refused_before_the_model_is_read(tmp_path, fail):
    assert "ends in .pt2" in fail("package", "nowhere", tmp_path / "m.pt")
    assert "unknown recipe 'w5'" in fail("package", "nowhere", tmp_path / "m.pt2", "-r", "w5")
    assert "is a folder" in fail("package", "nowhere", tmp_path)


@pytest.mark.slow
def test_a_package_is_run_by_the_other_commands(folder, tmp_path, call, fail):
    quantized, packaged = tmp_path / "q", tmp_path / "m.pt2"
    call("quantize", folder, quantized, "--recipe", "w4a16")
    printed = call("package", quantized, packaged)
    assert f"written: {packaged}" in " ".join(printed.split()) and "MB" in printed
    options = "--prompt", "the of", "--tokens", 6
    assert call("generate", packaged, *options) == call("generate", quantized, *options)
    assert "--compile is for a PyTorch model" in fail("generate", packaged, *options, "--compile")
    few = ["--prompt", 8, "--tokens", 2, "--rounds", 1]
    out = call("bench", packaged, "--against", packaged, *few, "--out", tmp_path / "b.json")
    assert "decode" in out and (tmp_path / "b.json").is_file()
    assert "--recipe is for a PyTorch model" in fail("bench", packaged, "--recipe", "int8")
    assert "is no package" in fail("bench", packaged, "--against", folder)
    assert "no chat template" in fail("chat", packaged)
