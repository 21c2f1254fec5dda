"""One kernel with its grid and constants, ready to be launched again and again.

Triton's JIT looks at every argument of every launch to find the compiled kernel that fits. Here that is done once for
each device and each combination of dtypes and alignments; later launches go straight to the compiled kernel, which
costs the CPU less. Where kernels are interpreted, every launch is the JIT's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.spec import KernelSpec
from qcompile.codegen.triton.launch.tiles import Launch, compiler_options

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which has no assembler: a kernel's plain form runs
TENSORS = ("x", "w", "scale", "zero", "bias", "residual", "low", "up", "x_scale", "steps", "out", "sums")
"""Names of the tensors of GEMMs."""


class KernelCall:
    """A kernel of GEMMs, its grid, and every argument that is no tensor.

    Attributes:
        names: of tensors, in the order in which a call takes them.
    """

    names: ClassVar[tuple[str, ...]] = TENSORS

    def __init__(self, spec: KernelSpec, launch: Launch, grid: tuple[int, ...], **sizes: float) -> None:
        self.spec, self.launch, self.grid = spec, launch, (*grid, 1, 1)[:3]
        self._function = kernel(spec)
        known = list(self._function.arg_names)
        constants = {**sizes, **launch.constants(known), "ASM": not INTERPRETED}
        self._arguments: list[Any] = [constants.get(name) for name in known]
        self._tensors = [(at, self.names.index(name)) for at, name in enumerate(known) if name not in constants]
        self._options = compiler_options(spec, launch)
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch on the current device and stream.

        Args:
            tensors: in the order of their names, contiguous; None where the kernel has no such argument.
        """
        arguments, device = self._arguments.copy(), -1
        kinds: list[Any] = []
        for at, index in self._tensors:
            tensor = tensors[index]
            assert tensor is not None
            arguments[at], device = tensor, tensor.get_device()
            kinds += (tensor.dtype, tensor.data_ptr() & 15 == 0)
        key = (device, *kinds)  # a compiled kernel is loaded on one device
        compiled = self._compiled.get(key)
        if compiled is None:
            found = self._function[self.grid](*arguments, **self._options)
            if found is not None:  # the interpreter has none
                self._compiled[key] = found[self.grid]
        else:
            compiled(*arguments)
