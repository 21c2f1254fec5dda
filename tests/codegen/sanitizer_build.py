"""A plugin of pytest for `make sanitize`: the C++ of the CPU target with address and undefined-behavior sanitizers.

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

# Less optimization: with more, the checks of all unrolled loops take many minutes to compile.
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1")

# A read that only a sanitizer notices, compiled and loaded as the operators are.
OUT_OF_BOUNDS = """
import ctypes, torch, sanitizer_build
from torch._inductor.codecache import CppCodeCache
from qcompile.codegen.cpu import native_kernels
sanitizer_build.use_flags()
source = 'extern "C" int byte_at(const char* from, long at) { return from[at]; }'
byte_at = CppCodeCache.load(source, extra_flags=native_kernels._COMPILER_FLAGS).byte_at
byte_at.argtypes = ctypes.c_void_p, ctypes.c_long
byte_at(torch.zeros(64, dtype=torch.uint8).data_ptr(), 64)
"""


def use_flags() -> None:
    """Compile the operators with the sanitizers from now on."""
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
