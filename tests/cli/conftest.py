"""A tiny local model, and calls of the command line with a terminal of a given width."""

from __future__ import annotations

import sys
import warnings

import pytest
from typer.testing import CliRunner
from zoo import build

from qcompile import cli


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def call():
    """Run a command that must succeed; returns what it prints."""

    def run(*arguments):
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


@pytest.fixture
def fail(monkeypatch, capsys):
    """Run a command through `main` that must end with code 2; returns its one line on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qcompile", *map(str, arguments)])
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main sets it for the process
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, errors
        return errors[0]

    return run


@pytest.fixture
def screen(monkeypatch):
    """Give the console a width, and make it a terminal or a pipe."""

    def use(width, terminal):
        monkeypatch.setattr(cli.console, "_width", width)
        monkeypatch.setattr(cli.console, "_force_terminal", terminal)

    return use


@pytest.fixture(scope="session")
def exported(folder, tmp_path_factory, call):
    """The tiny model as an ONNX folder, and what the export printed; not to be changed."""
    place = tmp_path_factory.mktemp("exported") / "o"
    return place, call("export-onnx", folder, place, "--recipe", "int8")
