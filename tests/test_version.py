"""Another package with the import name `qcompile` is told apart at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

from qcompile.version import VERSION, refuse_other_distribution


def test_the_version_is_that_of_the_distribution():
    assert metadata.version("torch-qcompile") == VERSION


def test_ours_alone_is_accepted():
    refuse_other_distribution()


@pytest.mark.parametrize("name", ["qcompile-0.1.25.dist-info", "QCompile-0.1.25.dist-info"])
def test_the_other_distribution_is_named_at_import(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "METADATA").write_text("Metadata-Version: 2.1\nName: qcompile\nVersion: 0.1.25\n")
    done = subprocess.run(
        [sys.executable, "-c", "import qcompile"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ImportError: the distribution qcompile 0.1.25" in done.stderr and "pip uninstall qcompile" in done.stderr
