"""The command line end to end, on a tiny local model."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner
from zoo import build

from qcompile import cli
from qcompile.cli import app, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local transformers folder with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model") / "tiny"
    build("llama").save_pretrained(path)
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "the", "a", "of", "is", "in", "to", "and"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    return str(path)


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_recipes_and_explain(folder, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 240)
    assert "int8-smooth" in call("recipes")
    assert json.loads(call("recipes", "w4a8"))["passes"][0]["weight"] == "int4/group128/zero/dual"
    out = call("explain", folder)
    assert "Rotation flows" in out and "closed once fold_norm" in out


def test_quantize_eval_verify_generate(folder, tmp_path):
    assert "15 of 15 sites" in call("quantize", folder, tmp_path / "q", "--recipe", "w4a8")
    assert "perplexity" in call("eval", tmp_path / "q", "--windows", 1, "--length", 64)
    assert "holds" in call("verify", folder, "--length", 16)
    assert "the" in call("generate", tmp_path / "q", "--prompt", "the", "--tokens", 3)


def test_export_and_generate(folder, tmp_path):
    assert "onnx relative error" in call("export-onnx", folder, tmp_path / "o", "--recipe", "int8")
    assert call("generate", tmp_path / "o", "--prompt", "the", "--tokens", 3).startswith("the")
    assert "perplexity" in call("eval", tmp_path / "o", "--windows", 1, "--length", 32)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["eval", "no/such/model"], "could not be loaded"),
        (["quantize", "embedded", "."], "not empty"),
        (["recipes", "int9"], "unknown recipe 'int9'"),
        (["generate", ".", "--prompt", "x"], "could not be loaded"),
    ],
)
def test_errors_are_one_line_and_code_two(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qcompile", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split()) and "Traceback" not in captured.err
