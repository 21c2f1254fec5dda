"""What commands print: lines, tables that lose no text, plots, warnings and errors.

A terminal gets a table where whole words fit into its width, or one block per row where that takes fewer lines. A pipe
or a file gets plain aligned text, one row a line and as wide as its cells, for grep and awk. Nothing is cut in either.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text, TextType

from qcompile.evaluation import plots

console = Console()

_FRAME = 4  # lines around the rows of a table, the header among them
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?[%x]?")


def tell(text: object, style: str = "") -> None:
    """Print lines as they are: no markup is read, and no line is wrapped but by the terminal."""
    console.print(Text(str(text), style), soft_wrap=True)


def tell_error(text: object) -> None:
    """Print one line on stderr, "error: .." (red on a terminal)."""
    line = Text.assemble(("error: ", "bold red"), _one_line(text))
    Console(file=sys.stderr).print(line, soft_wrap=True)


def note(text: object) -> None:
    """Print one line on stderr, "note: ..": what a command does otherwise than its arguments say."""
    Console(file=sys.stderr).print(Text.assemble(("note: ", "bold"), _one_line(text)), soft_wrap=True)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package as one line, for `warnings.formatwarning`; those of others as Python writes them."""
    if category.__module__.partition(".")[0] == "qcompile":
        return f"warning: {_one_line(message)}\n"
    return _format_others(message, category, filename, lineno, line)


_format_others = warnings.formatwarning


def print_table(what: RenderableType) -> None:
    """Print a table, or a group of tables and lines. Cells are text, not markup: a name may have brackets."""
    if isinstance(what, Group):
        for part in what.renderables:
            print_table(part)
    elif not isinstance(what, Table):
        tell(what)
    elif not console.is_terminal:
        for line in _aligned(what):
            tell(line)
    else:
        _unmark(what)
        fits = _set_widths(what, console.width)
        console.print(what if fits and _height(what) - _FRAME <= _height(_blocks(what)) else _blocks(what))


def write_plot(draw: Callable[[Path], None], path: Path) -> None:
    """Draw into a file and say so, or say what is missing."""
    if plots.is_available():
        draw(path)
        tell(f"written: {path}")
    else:
        tell(f"no {path.name}: {plots.NEEDS}")


def write_report(path: Path | None, title: str, **parts: Any) -> None:
    """Write what a command found as one HTML file, if one was asked for; `parts` are those of HTMLReport."""
    if path is not None:
        from qcompile.evaluation.html_report import HTMLReport

        HTMLReport(title, **parts).write(path)
        tell(f"written: {path}")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _cells(column: Iterable[object]) -> list[str]:
    return [cell.plain if isinstance(cell, Text) else str(cell) for cell in column]


def _unmark(table: Table) -> None:
    """Make Text of what rich would read as markup."""
    for column in table.columns:
        column.header, column.footer = _as_text(column.header), _as_text(column.footer)
        column._cells = [_as_text(cell) for cell in column._cells]
    table.title, table.caption = _title(table.title, "table.title"), _title(table.caption, "table.caption")


def _as_text(cell: RenderableType) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell


def _title(text: TextType | None, style: str) -> TextType | None:
    return Text(text, style, justify="center") if isinstance(text, str) and text else text


def _rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table as plain text."""
    header = _cells(column.header for column in table.columns) if table.show_header else [""] * len(table.columns)
    return header, [list(row) for row in zip(*(_cells(column.cells) for column in table.columns), strict=True)]


def _aligned(table: Table) -> Iterator[str]:
    header, rows = _rows(table)
    lines = [header, *rows] if table.show_header else rows
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    if table.title:
        yield _cells([table.title])[0]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _set_widths(table: Table, width: int) -> bool:
    """Give each column its longest word, and further space to those that wrap most; False if whole words do not fit."""
    header, rows = _rows(table)
    spare, columns = width - 1, list(zip(table.columns, zip(header, *rows, strict=True), strict=True))
    for column, cells in columns:
        column.width = max(len(word) for cell in cells for word in cell.split() or [""])
        column.justify = "right" if all(_NUMBER.fullmatch(cell) for cell in cells[1:] if cell) else "left"
        spare -= column.width + 3  # borders and padding
    if spare < 0:
        return False
    for _ in range(spare):
        column, cells = max(columns, key=lambda pair: max(map(len, pair[1])) / (pair[0].width or 1))
        if max(map(len, cells)) > (column.width or 0):
            column.width = (column.width or 0) + 1
    return True


def _blocks(table: Table) -> Group:
    """One block per row: its first cell, then the others that are not empty, each behind the name of its column."""
    header, rows = _rows(table)
    parts: list[RenderableType] = [Text(title, "italic") for title in _cells([table.title or ""]) if title]
    for first, *others in rows:
        named = [(name, cell) for name, cell in zip(header[1:], others, strict=True) if cell]
        items = [Text.assemble((f"{name}: " if name else "", "dim"), cell) for name, cell in named]
        parts += [Text(first, "bold"), Padding(Text(" | ").join(items), (0, 0, 0, 4))]
    return Group(*parts)


def _height(what: RenderableType) -> int:
    return len(console.render_lines(what))
