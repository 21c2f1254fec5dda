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


def text_file(place):
    path = place / "text.txt"
    path.write_text("the of a is in to and " * 2000)
    return path


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
    call("export-onnx", folder, tmp_path / "l", "--last-logits", "--low-memory", "--text", text_file(tmp_path))
    few = ["--prompt", 8, "--tokens", 2, "--rounds", 1]
    out = call("bench", tmp_path / "o", "--against", tmp_path / "l", *few, "--out", tmp_path / "b.json")
    assert "decode" in out and len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 2
    with pytest.raises(ValueError, match="--recipe is for a PyTorch model"):
        call("bench", tmp_path / "o", "--recipe", "int8")
    with pytest.raises(ValueError, match="--recipe is for a PyTorch model"):
        call("eval", tmp_path / "o", "--recipe", "int8")
    with pytest.raises(ValueError, match="--against is for ONNX folders"):
        call("bench", folder, "--against", tmp_path / "o")
    with pytest.raises(ValueError, match="last token's logits only"):
        call("eval", tmp_path / "l", "--windows", 1, "--length", 32)
    with pytest.raises(ValueError, match="prompt is empty"):
        call("generate", tmp_path / "o", "--prompt", "")
    (tmp_path / "o/tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        call("generate", tmp_path / "o", "--prompt", "the")


def test_chat(folder, tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        call("chat", folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    read = ["generate", str(tmp_path / "m"), "--prompt", "the of ", "--tokens", "4"]  # what the template makes of it
    answer = CliRunner().invoke(app, read).output.removeprefix("the of ").strip()
    assert answer and answer in outputs[0]


def test_compare_tune_sensitivity_advise(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 240)
    few = ["--windows", 1, "--length", 32]
    out = call("compare", folder, "--recipes", "int8,w4a16", *few, "--out", tmp_path / "c.json")
    assert "peak MB" in out and (tmp_path / "c.png").is_file()
    loose = call("tune", folder, "--max-loss", "500%", *few, "--out", tmp_path / "t.json")
    assert "w4a8 stays within 500.0%" in loose and (tmp_path / "t.png").is_file()
    out = call("sensitivity", folder, "--tokens", 16, "--bits", 6, "--out", tmp_path / "m.json", "--recipe", "w4a16")
    assert "15 sites, added up" in out
    assert "15 of 15 sites" in call("quantize", folder, tmp_path / "mixed", "--recipe", tmp_path / "m.json")
    assert "int8" in call("advise", folder, "--device", "cpu")
    assert "15 of 15 sites" in call("quantize", folder, tmp_path / "auto", "--recipe", "auto")


def test_tune_without_a_good_recipe_is_code_one(folder, tmp_path, monkeypatch):
    from qcompile.evaluation.compare import Comparison, RecipeResult

    def measure(self, name, recipe):
        return RecipeResult(name, 10.0 if name == "float" else 20.0, 0.0, 1.0, 5, 1.0)

    monkeypatch.setattr(Comparison, "_measure", measure)
    few = ["--windows", "1", "--length", "32", "--recipes", "w4a8", "--out", str(tmp_path / "t.json")]
    result = CliRunner().invoke(app, ["tune", folder, *few])
    assert result.exit_code == 1 and "nearest: w4a8" in result.output


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["eval", "no/such/model"], "could not be loaded"),
        (["quantize", "embedded", "."], "not empty"),
        (["recipes", "int9"], "unknown recipe 'int9'"),
        (["tune", "embedded", "--max-loss", "one"], "write a share"),
        (["sensitivity", "embedded", "--formats", "int9"], "format dtype 'int9' is unknown"),
        (["advise", "embedded", "--device", "tpu"], "device 'tpu' is unknown"),
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
