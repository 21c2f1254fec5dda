"""Rounding of fixed-point training on a CPU: training_kernels.cpp, compiled once on each machine with Inductor's compiler.

The operators that train are opaque to Inductor, so what they do inside is done here: one pass over memory in place of
ten. Without a C++ compiler the definitions in PyTorch run (qcompile/numerics/code_rounding.py), with a warning.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.numerics.code_rounding import install_rounding_kernels

_COMPILER_FLAGS = ("-ftree-loop-vectorize",)  # which Inductor disables for text of its own


class CpuRounding:
    """The kernels, as qcompile/numerics/code_rounding.py wants them."""

    def __init__(self) -> None:
        from torch._inductor.codecache import CppCodeCache

        library: Any = CppCodeCache.load(
            (Path(__file__).parent / "training_kernels.cpp").read_text(), extra_flags=_COMPILER_FLAGS
        )
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._round_gradient, self._round_operand = library.round_gradient, library.round_operand
        self._round_gradient.argtypes, self._round_gradient.restype = [*[pointer] * 4, *[size] * 5], None
        self._round_operand.argtypes, self._round_operand.restype = [*[pointer] * 5, *[size] * 5], None

    def gradient_codes(
        self, gradient: Tensor, step: Tensor, limit: Tensor, levels: int, draw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [N] and the count beyond the limit, int64 []."""
        codes = torch.empty(gradient.shape, dtype=torch.int8)
        beyond = torch.zeros((), dtype=torch.int64)
        steps = torch.stack([step.float(), limit.float()])
        self._round_gradient(
            gradient.data_ptr(), codes.data_ptr(), beyond.data_ptr(), steps.data_ptr(), gradient.numel(), levels,
            int(draw is not None), 0 if draw is None else int(draw), torch.get_num_threads(),
        )  # fmt: skip
        return codes, beyond

    def value_codes(
        self, x: Tensor, step: Tensor, clip: Tensor, low: int, high: int, signed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int8, which values are inside the clip, and whether there is a NaN."""
        codes, inside = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape, dtype=torch.bool)
        lost = torch.zeros((), dtype=torch.int64)
        steps = torch.stack([step.float(), clip.float()])
        self._round_operand(
            x.data_ptr(), codes.data_ptr(), inside.data_ptr(), lost.data_ptr(), steps.data_ptr(), x.numel(), low, high,
            int(signed), torch.get_num_threads(),
        )  # fmt: skip
        return codes, inside, lost > 0


@functools.cache
def install_cpu_rounding() -> None:
    """Compile the kernels, seconds on the first call on a machine, and use them from now on.

    Warns:
        UserWarning: there is no C++ compiler; training runs, and rounds some times slower.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        install_rounding_kernels("cpu", CpuRounding())
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"qcompile: the C++ kernels of fixed-point training cannot be built ({reason}), so PyTorch rounds, some "
            "times slower. Fix: install g++ or clang",
            stacklevel=2,
        )
