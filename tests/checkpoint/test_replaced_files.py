"""Files are moved into a folder that exists only when all of them were written."""

from __future__ import annotations

import os

import pytest
from filelock import FileLock

from qcompile.checkpoint.atomic_folder import CheckpointError, WriteError
from qcompile.checkpoint.replaced_files import replaced_files


def names(folder):
    return sorted(os.listdir(folder))


def test_a_new_folder_appears_whole(tmp_path):
    with replaced_files(tmp_path / "a/b") as work:
        (work / "x").write_text("1")
        assert not (tmp_path / "a/b").exists()
    assert names(tmp_path / "a/b") == ["x"]


def test_files_of_the_same_name_are_replaced_and_others_stay(tmp_path):
    for name in ("x", "y", "qcompile.safetensors", "qcompile-00001-of-00002.safetensors", "qcompile.json.bak"):
        (tmp_path / name).write_text("old")
    with replaced_files(tmp_path) as work:
        (work / "x").write_text("new")
        (work / "qcompile.safetensors.index.json").write_text("new")
    assert names(tmp_path) == ["qcompile.json.bak", "qcompile.safetensors.index.json", "x", "y"]
    assert [(tmp_path / name).read_text() for name in "xy"] == ["new", "old"]


def test_the_current_folder_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with replaced_files(".") as work:
        (work / "x").write_text("1")
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_it_as_it_was(error, tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)), replaced_files(tmp_path) as work:
        (work / "x").write_text("new")
        raise error
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_moved(tmp_path):
    (tmp_path / "y").mkdir()
    with pytest.raises(CheckpointError, match="y is a folder. Fix: remove it"), replaced_files(tmp_path) as work:
        (work / "x").write_text("1")
        (work / "y").write_text("1")
    assert names(tmp_path) == ["y"]


def test_one_writer_at_a_time(tmp_path):
    lock = FileLock(tmp_path / ".qcompile.lock")
    with lock, pytest.raises(CheckpointError, match="being written by another run"), replaced_files(tmp_path):
        pass


def test_a_file_is_no_folder_and_space_is_checked(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(CheckpointError, match="is a file. Fix: choose another folder"), replaced_files(tmp_path / "f"):
        pass
    with pytest.raises(WriteError, match="MB free. Fix: free some space"), replaced_files(tmp_path, 10**18):
        pass
