"""Paths that cannot be read or written are refused before any work, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import sys
from collections import namedtuple

import pytest
import typer
from zoo import build

from qcompile.cli.path_checks import (
    continued_file,
    data_rows,
    html_file,
    output_file,
    output_folder,
    plotted_file,
    require_space,
    text_file,
    weight_bits,
    work_folder,
)
from qcompile.pipeline.presets import PRESETS

WRITERS = [output_file, plotted_file, continued_file, output_folder, work_folder]
unix = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of Unix")


@pytest.mark.parametrize("read", [text_file, *WRITERS])
def test_empty_and_impossible_paths(read, tmp_path):
    (tmp_path / "file").write_text("text")
    for value in ("", "  ", tmp_path / ("x" * 300), tmp_path / "file" / "below"):
        with pytest.raises(typer.BadParameter):
            read(str(value))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("read", WRITERS)
def test_places_that_cannot_be_written(read):
    with pytest.raises(typer.BadParameter, match="cannot be written"):
        read("/proc/no/such")


@pytest.mark.parametrize("read", WRITERS)
def test_new_places_are_fine_and_not_made_yet(read, tmp_path):
    path = tmp_path / "[q4_k]" / "a.json"
    assert read(str(path)) == read(path) == path and not list(tmp_path.iterdir())


def test_data_sets(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"label": 1}\n')
    rows = data_rows(str(tmp_path / "a.jsonl"))
    assert rows.column == "text" and data_rows(rows) is rows
    for name, words in [("", "is empty"), (tmp_path / "no.jsonl", "cannot be read"), (tmp_path / "b.jsonl", "'label'")]:
        with pytest.raises(typer.BadParameter, match=words):
            data_rows(str(name))


def test_texts(tmp_path):
    (tmp_path / "t.txt").write_text("a text")
    (tmp_path / "binary").write_bytes(b"\xff\xff")
    assert text_file(str(tmp_path / "t.txt")) == tmp_path / "t.txt"
    for name, words in [("no", "not found"), (".", "is a folder"), ("binary", "no UTF-8 text")]:
        with pytest.raises(typer.BadParameter, match=words):
            text_file(str(tmp_path / name))


def test_a_report_is_named_as_html(tmp_path):
    assert html_file(str(tmp_path / "r.html")) == tmp_path / "r.html"
    with pytest.raises(typer.BadParameter, match="ends in .html"):
        html_file(str(tmp_path / "r.json"))


def test_folders_that_are_not_empty(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(typer.BadParameter, match="not empty"):
        output_folder(str(tmp_path))
    assert work_folder(str(tmp_path)) == tmp_path
    with pytest.raises(typer.BadParameter, match="is a file"):
        work_folder(str(tmp_path / "a.json"))
    with pytest.raises(typer.BadParameter, match="is a folder"):
        output_file(str(tmp_path))
    assert output_file(str(tmp_path / "a.json")) and plotted_file(str(tmp_path / "a.json"))
    with pytest.raises(typer.BadParameter, match="no file of a comparison"):
        continued_file(str(tmp_path / "a.json"))


@pytest.mark.parametrize("read", [plotted_file, continued_file])
def test_a_plot_never_replaces_the_file_itself(read, tmp_path):
    with pytest.raises(typer.BadParameter, match="where the plot goes"):
        read(str(tmp_path / "c.png"))
    assert read(str(tmp_path / "c.partial")) == tmp_path / "c.partial" and not list(tmp_path.iterdir())


@unix
def test_links_and_pipes(tmp_path):
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    target.write_text("precious")
    link.symlink_to(target)
    os.mkfifo(pipe)
    for read in (output_file, plotted_file):
        with pytest.raises(typer.BadParameter, match="is a link to .*target.json, which would be replaced"):
            read(str(link))
        assert read(str(pipe)) == pipe and text_file(str(pipe)) == pipe, "a pipe is written, and read, once"
    with pytest.raises(typer.BadParameter, match="no regular file"):
        continued_file(str(pipe))
    (tmp_path / "c.png").symlink_to(target)
    for read in (plotted_file, continued_file):
        with pytest.raises(typer.BadParameter, match="the plot goes to .*c.png, which is a link"):
            read(str(tmp_path / "c.json"))
    assert target.read_text() == "precious" and link.is_symlink()


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    model, usage = build("llama"), namedtuple("usage", "free")
    weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "lm_head" in name)
    tables = sum(p.numel() for p in model.parameters()) - weights
    for bits in (4, 8):
        needed = weights * bits // 8 + tables
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=needed: usage(n))
        require_space(tmp_path / "new" / "folder", model, bits)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=needed: usage(n - 1))
        with pytest.raises(ValueError, match="folder needs .* MB, and .* MB free. Fix: free some space"):
            require_space(tmp_path / "new" / "folder", model, bits)


def test_bits_are_the_fewest_of_a_recipe():
    found = {name: weight_bits(PRESETS[name]) for name in ("float", "int8", "w4a16-gptq", "w4a8", "w8a16")}
    assert found == {"float": 16, "int8": 8, "w4a16-gptq": 4, "w4a8": 4, "w8a16": 8}
