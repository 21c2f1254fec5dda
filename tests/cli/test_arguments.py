"""The arguments that commands share, and flags made of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from qcompile.api import load_package
from qcompile.calibration import dataset
from qcompile.calibration.dataset import DataRows
from qcompile.cli.arguments import (
    calibration_batches,
    cap_length,
    flags_of,
    is_exported,
    is_packaged,
    load,
    needs_text,
    open_package,
    split_names,
)


@dataclass
class Options:
    level: int = field(default=4, metadata={"help": "the level"})
    fast_path: bool = field(default=True, metadata={"help": "take it"})
    quiet: bool = field(default=False, metadata={"help": "say nothing"})
    name: str | None = field(default=None, metadata={"help": "a name"})


def command(place: list):
    app = typer.Typer()

    @app.command()
    @flags_of(Options)
    def run(word: str, options: Options) -> None:
        """Run it."""
        place.append((word, options))

    return app


@pytest.mark.parametrize(
    "arguments,options",
    [
        ([], Options()),
        (["--level", "1", "--no-fast-path"], Options(1, False)),
        (["--quiet"], Options(quiet=True)),
        (["--name", "x", "--fast-path"], Options(name="x")),
    ],
)
def test_a_dataclass_gives_the_flags(arguments, options):
    place = []
    result = CliRunner().invoke(command(place), ["w", *arguments], catch_exceptions=False)
    assert result.exit_code == 0 and place == [("w", options)]


def test_the_help_is_that_of_the_fields():
    out = CliRunner().invoke(command([]), ["--help"]).output
    assert "Run it." in out and all(text in out for text in ("the level", "take it", "--no-fast-path", "[default: 4]"))
    assert "--quiet" in out and "--no-quiet" not in out, "it is off by default"


def test_an_unknown_dtype_is_refused_before_loading():
    with pytest.raises(ValueError, match="--dtype 'half' is unknown"):
        load("embedded", "half")


def test_batches_are_read_only_where_a_recipe_needs_them(monkeypatch, capsys):
    from qcompile.calibration import text

    monkeypatch.setattr(text, "batches", lambda tokenizer, path, length: ("batches", path, length))
    model = SimpleNamespace(config=SimpleNamespace(n_positions=256))
    assert calibration_batches("int8", model, None, None) is None
    assert calibration_batches("auto", model, None, None) is None and not capsys.readouterr().err
    assert calibration_batches("w4a16-gptq", model, None, None) == ("batches", None, 256)
    assert "note: calibration windows of 256 tokens, not 512" in capsys.readouterr().err
    assert calibration_batches("auto", None, None, "t.txt") == ("batches", "t.txt", 512)


def test_a_text_that_no_recipe_needs_is_said_to_be_ignored(capsys):
    assert calibration_batches("int8", None, None, Path("[red].txt")) is None
    assert capsys.readouterr().err == "note: --text [red].txt is ignored: int8 needs no calibration data\n"
    assert needs_text("--calibration", Path("t"), "int8", "w4a16-gptq") and not capsys.readouterr().err


def test_a_data_set_takes_the_place_of_a_text(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcdefgh"}\n')
    rows = DataRows.open(path)
    monkeypatch.setattr(dataset, "dataset_batches", lambda tokenizer, data, length: ("rows", data.name, length))
    assert calibration_batches("w4a16-gptq", None, None, None, rows) == ("rows", str(path), 512)
    assert calibration_batches("auto", None, None, None, rows) == ("rows", str(path), 512)
    assert calibration_batches("int8", None, None, None, rows) is None
    assert capsys.readouterr().err == f"note: --data {path} is ignored: int8 needs no calibration data\n"
    with pytest.raises(ValueError, match="--calibration t and --data .*a.jsonl are both given. Fix: drop one"):
        needs_text("--calibration", Path("t"), "int8", data=rows)


def test_a_window_is_capped_and_that_is_said(capsys):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))
    assert cap_length(64, model, None) == 64 and not capsys.readouterr().err
    assert cap_length(2048, model, None) == 256
    assert capsys.readouterr().err == "note: windows of 256 tokens, not 2048: the context of the model ends there\n"


def test_names_and_folders(tmp_path):
    assert split_names("a, b,c") == ["a", "b", "c"]
    assert not is_exported(str(tmp_path))
    (tmp_path / "model.onnx").touch()
    assert is_exported(str(tmp_path))


def test_a_package_that_the_commands_cannot_use(monkeypatch):
    assert is_packaged("a/b.pt2") and not is_packaged("a/b.pt")
    opened = SimpleNamespace(generate=len, tokenizer="a tokenizer")
    monkeypatch.setattr(load_package, "load_package", lambda path: opened)
    assert open_package("m.pt2") == (opened, "a tokenizer")
    opened.tokenizer = None
    with pytest.raises(ValueError, match="m.pt2 has no tokenizer. Fix: package it with one"):
        open_package("m.pt2")
    del opened.generate
    with pytest.raises(ValueError, match="m.pt2 generates no text. Fix"):
        open_package("m.pt2")
