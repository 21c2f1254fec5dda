"""The arguments that commands share, and flags made of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import typer
from typer.testing import CliRunner

from qcompile.cli.arguments import calibration_batches, flags_of, is_exported, load, split_names


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


def test_batches_are_read_only_where_a_recipe_needs_them(monkeypatch):
    from qcompile.calibration import text

    monkeypatch.setattr(text, "batches", lambda tokenizer, path: ("batches", path))
    assert calibration_batches("int8", None, None) is None
    assert calibration_batches("w4a16-gptq", None, None) == ("batches", None)
    assert calibration_batches("auto", None, None) is None
    assert calibration_batches("auto", None, "t.txt") == ("batches", "t.txt")


def test_names_and_folders(tmp_path):
    assert split_names("a, b,c") == ["a", "b", "c"]
    assert not is_exported(str(tmp_path))
    (tmp_path / "model.onnx").touch()
    assert is_exported(str(tmp_path))
