"""The device "pretend", which device.cpp registers with PyTorch: compiled once for a version of PyTorch, and kept."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).parent / "device.cpp"
NAME = "pretend"


@functools.cache
def register() -> torch.device:
    """Make the device known to this process."""
    torch.ops.load_library(str(_library()))
    module = types.ModuleType(NAME)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "current_device": 0,
        "device_count": 1,
        "_is_in_bad_fork": False,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    for name in ("manual_seed_all", "synchronize", "set_device"):
        setattr(module, name, lambda *_: None)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


def _library() -> Path:
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"qcompile-pretend-{key}.so"
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        (libraries,) = cpp_extension.library_paths()
        subprocess.run(
            [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
            + [f"-I{folder}" for folder in cpp_extension.include_paths()]
            + [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"],
            check=True,
        )
        partial.replace(path)
    return path
