"""`qcompile generate` and `chat`: PyTorch and ONNX Runtime print the same."""

from __future__ import annotations

import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qcompile.cli import app


def test_generate_by_an_exported_folder(exported, tmp_path, call):
    place, printed = exported
    assert "onnx relative error" in printed
    assert call("generate", place, "--prompt", "the", "--tokens", 3).startswith("the")
    assert "perplexity" in call("eval", place, "--windows", 1, "--length", 32)
    copied = shutil.copytree(place, tmp_path / "o")
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        call("generate", copied, "--prompt", "the")


def test_only_a_pytorch_model_is_compiled(exported, call):
    with pytest.raises(ValueError, match="--compile is for a PyTorch model"):
        call("generate", exported[0], "--prompt", "the", "--compile")


@pytest.mark.slow
def test_a_compiled_model_prints_the_same(folder, tmp_path, call):
    options = "--prompt", "the of", "--tokens", 6
    quantized = tmp_path / "q"
    call("quantize", folder, quantized, "--recipe", "w4a16")
    plain, compiled = call("generate", quantized, *options), call("generate", quantized, *options, "--compile")
    assert "one compiled step" in compiled and compiled.endswith(plain)


@pytest.mark.slow
def test_chat(folder, tmp_path, call):
    with pytest.raises(ValueError, match="no chat template"):
        call("chat", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    call("export-onnx", tmp_path / "m", tmp_path / "o", "--recipe", "w4a16")
    outputs = []
    for place in (tmp_path / "m", tmp_path / "o"):
        result = CliRunner().invoke(app, ["chat", str(place), "--tokens", "4"], input="the of\nis\n\n")
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    assert all(output.count("you:") == 3 for output in outputs)
    read = ["generate", str(tmp_path / "m"), "--prompt", "the of ", "--tokens", "4"]  # as the template writes it
    answer = CliRunner().invoke(app, read).output.removeprefix("the of ").strip()
    assert answer and answer in outputs[0]
