"""Rendered kernels as files of the user's cache."""

from __future__ import annotations

from qcompile.codegen.triton.kernels.jit import source_file
from qcompile.codegen.triton.kernels.render import render
from qcompile.codegen.triton.kernels.spec import GemmW


def test_the_source_is_a_file_that_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    path = source_file(GemmW())
    assert path.parent == tmp_path / "kernels" and path.read_text() == render(GemmW())
    before = path.stat().st_mtime_ns
    assert source_file(GemmW()) == path and path.stat().st_mtime_ns == before
    assert source_file(GemmW("fp16")) != path and len(list(path.parent.iterdir())) == 2
