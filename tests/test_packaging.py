"""The wheel: what is in it, and that a user's project can be checked against its types."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built without the network."""
    out = tmp_path_factory.mktemp("wheel")
    sources = out / "sources"  # a build writes beside its sources
    for name in ("qcompile", "passes", "codegen"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-build-isolation", "--wheel-dir", str(out), str(sources)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_holds_every_source_and_data_file(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("qcompile", "passes", "codegen"):
        for path in (ROOT / folder).rglob("*"):
            place = path.relative_to(ROOT)
            if path.is_dir() or path.suffix == ".pyc" or str(place).startswith(("qcompile/passes", "qcompile/codegen")):
                continue
            name = str(place) if folder == "qcompile" else f"qcompile/{place}"
            assert name in inside, name


@pytest.mark.slow
def test_a_users_file_passes_mypy_strict(wheel, tmp_path):
    """In an environment where the wheel is installed, beside the torch of this one."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    zipfile.ZipFile(wheel).extractall(site)
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    consumer, mistaken = tmp_path / "consumer.py", tmp_path / "mistaken.py"
    consumer.write_text((ROOT / "tests/data/consumer.py").read_text())
    mistaken.write_text("import qcompile\nsize: int = qcompile.Format('int8')\nqcompile.Rule('*', kept=True)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "--config-file", "",
               "--cache-dir", str(tmp_path / "cache"), str(consumer), str(mistaken)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    errors = [line.split(": error: ")[0] for line in done.stdout.splitlines() if ": error: " in line]
    assert errors == ["mistaken.py:2", "mistaken.py:3"], done.stdout + done.stderr
