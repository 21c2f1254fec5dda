"""Rendered kernels as files, so that tracebacks, debuggers and readers find them, and as functions."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from qcompile.codegen.triton.kernels.render import render
from qcompile.codegen.triton.kernels.spec import KernelSpec


def cache_folder() -> Path:
    """$QCOMPILE_CACHE, or qcompile in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("QCOMPILE_CACHE", home / "qcompile"))


def source_file(spec: KernelSpec) -> Path:
    """The file that holds a kernel, written if it is not there; another source has another name."""
    text = render(spec)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = cache_folder() / "kernels" / f"{spec.template}_{digest}.py"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".py", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)  # atomic: other processes render the same
    return path


@functools.cache
def kernel(spec: KernelSpec) -> Any:
    """The kernel of a spec, for Triton to compile (or to interpret, where TRITON_INTERPRET is set).

    Raises:
        ImportError: triton is not installed.
    """
    path = source_file(spec)
    found = importlib.util.spec_from_file_location(f"qcompile_{path.stem}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, spec.template)
