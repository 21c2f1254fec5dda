"""Files that appear whole or not at all: links, pipes, interruptions, and places that cannot be written."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from qcompile.memory import atomic_file
from qcompile.memory.atomic_file import check_writable, whole_file, write_whole

unix = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of Unix")


@pytest.mark.parametrize("name", ["a.json", "a.partial", "a.png", "a"])
def test_a_file_is_written_and_replaced_and_nothing_else_stays(name, tmp_path):
    path = tmp_path / "new" / name
    write_whole(path, "one")
    path.chmod(0o640)
    write_whole(path, "twö")
    assert path.read_text(encoding="utf-8") == "twö" and path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_an_interruption_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    monkeypatch.setattr(atomic_file.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@unix
def test_a_link_stays_and_what_it_names_is_replaced(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "else" / "target.json"
    link.symlink_to(target)
    write_whole(link, "text")
    assert link.is_symlink() and target.read_text() == "text"


@unix
def test_a_pipe_receives_the_text_and_stays(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "text")
    reader.join(5)
    assert got == ["text"] and pipe.is_fifo()


@pytest.mark.parametrize("below", ["a.json", "new/deep/a.json"])
def test_a_check_leaves_nothing(below, tmp_path):
    check_writable(tmp_path / below)
    assert not list(tmp_path.iterdir())


@unix
def test_what_cannot_be_written_is_said_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 300), tmp_path / "no" / ("x" * 300), loop, "/proc/a"):
        with pytest.raises(ValueError, match="cannot be written: .+. Fix: choose another place"):
            check_writable(path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "loop"}


def test_a_file_written_in_pieces_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.pt2"
    for content in (b"one", b"another"):
        with whole_file(path) as work:
            assert work.name == path.name and work.parent.parent == path.parent
            work.write_bytes(content)
            assert path.exists() == (content != b"one")
            before = path.stat().st_ino if path.exists() else None
        assert path.read_bytes() == content and path.stat().st_ino != before
        path.chmod(0o640)
    assert path.stat().st_mode & 0o777 == 0o640 and list(path.parent.iterdir()) == [path]


def test_a_failure_while_a_file_is_written_in_pieces(tmp_path):
    path = tmp_path / "a.pt2"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as work:
        work.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
