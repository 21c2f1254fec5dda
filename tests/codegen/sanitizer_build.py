"""A plugin of pytest for `make sanitize`: native_kernels.cpp with address and undefined-behavior sanitizers.

The runtime of the sanitizers must be loaded before Python's own memory is, by LD_PRELOAD. What they find ends the
process with a report. QCOMPILE_FUZZ is how many random calls each property test makes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import hypothesis
import pytest

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")

OUT_OF_BOUNDS = """
import torch, sanitizer_build
from qcompile.codegen.cpu import native_kernels
sanitizer_build.use_flags()
short = torch.zeros(2, 1, 16, dtype=torch.uint8)
native_kernels._call("unpack_dual", short, short, short, torch.empty(64, dtype=torch.int8), 64, 2, 2, 16)
"""


def use_flags() -> None:
    """Compile native_kernels.cpp with the sanitizers from now on."""
    from qcompile.codegen.cpu import native_kernels

    native_kernels._COMPILER_FLAGS += FLAGS


def pytest_configure(config: pytest.Config) -> None:
    """Check that a read out of bounds is found, then let all tests run with the flags."""
    if not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise pytest.UsageError("the runtime of the address sanitizer is not loaded. Fix: run `make sanitize`")
    path = os.pathsep.join(sys.path)
    found = subprocess.run(
        [sys.executable, "-c", OUT_OF_BOUNDS], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if "AddressSanitizer: heap-buffer-overflow" not in found.stderr:
        raise pytest.UsageError(f"the sanitizers do not find a read out of bounds: {found.stderr[-2000:]}")
    use_flags()
    examples = int(os.environ.get("QCOMPILE_FUZZ", "1000"))
    default = hypothesis.settings.get_profile("qcompile")
    hypothesis.settings.register_profile("sanitize", default, max_examples=examples, derandomize=False)
    hypothesis.settings.load_profile("sanitize")
