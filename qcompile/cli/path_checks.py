"""Paths on the command line: what cannot be read or written is refused in one line, before any work.

Each takes what typer gives (a text, or the default as it stands) and raises typer.BadParameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from torch import nn

from qcompile.calibration.dataset import DataRows
from qcompile.calibration.text import read_text
from qcompile.checkpoint.atomic_folder import require_empty
from qcompile.memory.atomic_file import check_writable


def text_file(value: str | Path) -> Path:
    """A text that can be read: a file, or a pipe."""
    path = _path(value)
    if not path.exists():
        raise typer.BadParameter(f"{path} is not found. Fix: check the path")
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Fix: name a text file")
    if path.is_file():  # a pipe is read once, later
        try:
            read_text(path)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return path


def data_rows(value: str | DataRows) -> DataRows:
    """A data set with a column that can be read."""
    if isinstance(value, DataRows):
        return value
    if not value.strip():
        raise typer.BadParameter("the name is empty")
    try:
        return DataRows.open(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def output_file(value: str | Path) -> Path:
    """A file to write."""
    path = _path(value)
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Fix: name a file in it")
    if path.is_symlink() and path.exists():
        raise typer.BadParameter(f"{path} is a link to {path.resolve()}, which would be replaced. Fix: name that file")
    return _writable(path)


def output_package(value: str | Path) -> Path:
    """A package to write."""
    path = output_file(value)
    if path.suffix != ".pt2":
        raise typer.BadParameter(f"{path} is no name for a package. Fix: name a file that ends in .pt2")
    return path


def html_file(value: str | Path) -> Path:
    """A report to write."""
    path = output_file(value)
    if path.suffix != ".html":
        raise typer.BadParameter(f"{path} is no name for a report. Fix: name a file that ends in .html")
    return path


def plotted_file(value: str | Path) -> Path:
    """A file to write, with a plot beside it that ends in .png."""
    path = output_file(value)
    _check_plot(path)
    return path


def continued_file(value: str | Path) -> Path:
    """A file of a comparison to write and to continue, with a plot beside it. A link stays: what it names is read."""
    from qcompile.evaluation.compare import read_rows

    path = _path(value)
    try:
        read_rows(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _check_plot(path)
    return _writable(path)


def output_folder(value: str | Path) -> Path:
    """A folder to write that does not exist, or is empty."""
    path = _path(value)
    _writable(path)
    try:
        require_empty(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return path


def work_folder(value: str | Path) -> Path:
    """A folder to write into, whatever is there."""
    path = _path(value)
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{path} is a file. Fix: name a folder")
    _writable(path / "probe")
    return path


def require_space(folder: Path, model: nn.Module, bits: float) -> None:
    """Refuse a disk that is too small for what will be written.

    Args:
        folder: to write.
        model: before it is quantized.
        bits: of one weight, at the least; other tensors are counted at a byte each.

    Raises:
        CheckpointError: with the space that is needed and that there is.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in tables)
    others = sum(p.numel() for p in model.parameters() if p.ndim < 2 or id(p) in tables)
    require_empty(folder, int(weights * bits / 8) + others)


def weight_bits(recipe: Any) -> float:
    """The fewest bits that a recipe gives to one weight; 16 where it quantizes none."""
    formats = [getattr(config, "weight", None) for config in recipe.passes]
    formats += [rule.weight for rule in recipe.rules]
    return min((f.bits for f in formats if f is not None), default=16 if not recipe.passes else 2)


def _path(value: str | Path) -> Path:
    if not str(value).strip():
        raise typer.BadParameter("the path is empty")
    try:
        path = Path(value)
        path.exists()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{value} is no path here: {getattr(error, 'strerror', None) or error}") from None
    return path


def _writable(path: Path) -> Path:
    try:
        check_writable(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return path


def _check_plot(path: Path) -> None:
    if path.suffix == ".png":
        raise typer.BadParameter(f"{path} is where the plot goes, and this is JSON. Fix: end it in .json")
    plot = path.with_suffix(".png")
    if plot.is_symlink() or (plot.exists() and not plot.is_file()):
        raise typer.BadParameter(f"the plot goes to {plot}, which is a link or no file. Fix: choose another name")
