"""What commands print: no text is lost on a narrow terminal or in a pipe."""

from __future__ import annotations

import warnings

import pytest
from rich.console import Group
from rich.table import Table

from qcompile import cli
from qcompile.cli.output import format_warning, print_table, tell, write_plot
from qcompile.evaluation import plots
from qcompile.recipe.schema import SchemaUpgraded

WORDS = ["model.layers.0.some_quite_long_name.of_a_projection.weight", "another-name-that-does-not-break-at-all"]


def wide(title="a title"):
    table = Table("site", "a long header", "12 columns", title=title)
    table.add_row(WORDS[0], WORDS[1], "1.5")
    table.add_row("x", "", "1000")
    return table


@pytest.mark.parametrize("width,terminal", [(80, True), (200, True), (80, False)])
def test_no_word_is_cut(width, terminal, screen, capsys):
    screen(width, terminal)
    print_table(Group(wide(), "and a line"))
    out = capsys.readouterr().out
    assert "…" not in out and "and a line" in out and "a title" in out
    for word in [*WORDS, "1.5", "1000", "a long header"]:
        assert word in out


def test_a_pipe_gets_one_aligned_line_per_row(screen, capsys):
    screen(80, False)
    print_table(wide())
    title, header, first, second = capsys.readouterr().out.splitlines()
    assert title == "a title" and header.split("  ")[0] == "site" and first.split() == [*WORDS, "1.5"]
    assert first.index("1.5") == second.index("1000") == header.index("12 columns")
    assert not any(line.endswith(" ") for line in (title, header, first, second))


def test_a_narrow_terminal_gets_blocks(screen, capsys, monkeypatch):
    screen(70, True)
    monkeypatch.setattr(cli.console, "_color_system", None)
    print_table(wide())
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["a title", WORDS[0]] and lines[-2:] == ["x", "    12 columns: 1000"], (
        "an empty cell has no name"
    )
    assert " ".join(lines[2:-2]).split() == f"a long header: {WORDS[1]} | 12 columns: 1.5".split()


def test_the_layout_with_fewer_lines_is_taken(screen, capsys):
    screen(80, True)
    table = Table("name", "text", "more")
    table.add_row("a", "word " * 90, "word " * 9)
    print_table(table)
    assert "│" not in capsys.readouterr().out
    table = Table("name", "text", "more")
    table.add_row("a", "word", "1")
    print_table(table)
    assert "│" in capsys.readouterr().out


def test_a_line_is_not_wrapped_and_not_read_as_markup(screen, capsys):
    screen(40, False)
    tell("[B, 1, V] [red]" + "x" * 100)
    assert capsys.readouterr().out == "[B, 1, V] [red]" + "x" * 100 + "\n"


def test_warnings_of_ours_are_one_line():
    assert format_warning(SchemaUpgraded("a\nb"), SchemaUpgraded, "file.py", 3) == "warning: a b\n"
    others = format_warning("c", UserWarning, "file.py", 3)
    assert others == warnings.formatwarning("c", UserWarning, "file.py", 3) and "file.py:3" in others


def test_a_plot_that_cannot_be_drawn_is_said(tmp_path, monkeypatch, capsys):
    write_plot(lambda path: path.write_text("x"), tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
    monkeypatch.setattr(plots, "is_available", lambda: False)
    write_plot(lambda path: pytest.fail("drawn"), tmp_path / "b.png")
    assert "no b.png: plots need: pip install" in capsys.readouterr().out
