"""The environment of a measurement: versions of the libraries, the processor, threads."""

from __future__ import annotations

import platform
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """Versions of Python and the libraries, the processor, its instruction set, and torch's threads."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for name in ("torch", "transformers", "onnxruntime", "torch-qcompile"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["cpu"] = _cpu()
    found["isa"] = torch.backends.cpu.get_cpu_capability()
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
