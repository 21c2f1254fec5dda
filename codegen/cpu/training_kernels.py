"""Rounding in training on a CPU: training_kernels.cpp, compiled once on each machine with Inductor's compiler.

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
from qcompile.numerics.code_update import NOT_FINITE
from qcompile.numerics.qparams import MIN_SCALE
from qcompile.numerics.qtensor import QTensor

_COMPILER_FLAGS = ("-ftree-loop-vectorize",)  # which Inductor disables for text of its own


class CpuRounding:
    """The kernels, as qcompile/numerics/code_rounding.py wants them."""

    def __init__(self) -> None:
        from torch._inductor.codecache import CppCodeCache

        library: Any = CppCodeCache.load(
            (Path(__file__).parent / "training_kernels.cpp").read_text(), extra_flags=_COMPILER_FLAGS
        )
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for name, pointers, sizes in (("round_gradient", 4, 5), ("round_values", 4, 4), ("change_codes", 9, 7)):
            function = getattr(library, name)
            function.argtypes, function.restype = [*[pointer] * pointers, *[size] * sizes], None
        self._library = library

    def gradient_codes(
        self, gradient: Tensor, step: Tensor, limit: Tensor, levels: int, draw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [N] and the count beyond the limit, int64 []."""
        codes = torch.empty(gradient.shape, dtype=torch.int8)
        beyond = torch.zeros((), dtype=torch.int64)
        steps = torch.stack([step.float(), limit.float()])
        self._library.round_gradient(
            gradient.data_ptr(), codes.data_ptr(), beyond.data_ptr(), steps.data_ptr(), gradient.numel(), levels,
            int(draw is not None), 0 if draw is None else int(draw), torch.get_num_threads(),
        )  # fmt: skip
        return codes, beyond

    def value_codes(self, x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Codes int8 [N], and whether there is a NaN."""
        codes, lost = torch.empty(x.shape, dtype=torch.int8), torch.zeros((), dtype=torch.int64)
        steps = step.float().contiguous()
        self._library.round_values(
            x.data_ptr(), codes.data_ptr(), lost.data_ptr(), steps.data_ptr(), x.numel(), low, high,
            torch.get_num_threads(),
        )  # fmt: skip
        return codes, lost > 0

    def changed_codes(self, weight: QTensor, change: Tensor, decay: float, draw: Tensor | None) -> QTensor | None:
        """Of int8 codes with groups and integer zero points, as Q-GaLore has them; None for others."""
        form = weight.format
        if (form.dtype, form.per, form.zero) != ("int8", "group", "int") or weight.zero is None:
            return None
        old = (weight.codes.contiguous(), weight.scale.float().contiguous(), weight.zero.contiguous())
        new = tuple(torch.empty_like(part) for part in old)
        bad, limits = torch.zeros((), dtype=torch.int64), torch.tensor([1.0 - decay, MIN_SCALE])
        rows, columns = change.shape
        self._library.change_codes(
            change.data_ptr(), *(part.data_ptr() for part in (*old, *new)), bad.data_ptr(), limits.data_ptr(), rows,
            columns, form.width(columns), int(bool(decay)), int(draw is not None), 0 if draw is None else int(draw),
            torch.get_num_threads(),
        )  # fmt: skip
        if int(bad):
            raise ValueError(NOT_FINITE)
        return QTensor(new[0], new[1], new[2], None, form)


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
