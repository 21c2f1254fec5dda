"""From a spec to source: plain Triton that says what it does, without a branch that is never taken."""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qcompile.codegen.triton.kernels.spec import KernelSpec

_TEMPLATES = Path(__file__).parent / "templates"
_HEADER = '''"""{spec}

Rendered by qcompile; `qcompile kernels show {spec}` prints it.
"""

import triton
import triton.language as tl


'''


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["tl"] = {"bf16": "tl.bfloat16", "fp16": "tl.float16"}.__getitem__
    environment.filters["padded"] = padded
    return environment


def padded(size: int) -> int:
    """The power of two to which a side of a tensor core's tile is padded: at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def render(spec: KernelSpec) -> str:
    """The source of a module with one kernel, named as the template, after the functions that it calls."""
    body = _environment().get_template(f"{spec.template}.py.jinja").render(spec=spec)
    lines = "".join(line + "\n" for line in body.splitlines() if line.strip())
    return _HEADER.format(spec=spec) + lines.replace("\n@triton.jit", "\n\n\n@triton.jit")
