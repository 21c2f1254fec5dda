"""Run the kernels that round in training: gradients, values, and weights to which a change is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.spec import KernelSpec
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues
from qcompile.codegen.triton.launch.tiles import Launch, compiler_options, launch_of

MAX_GROUP = 8192  # columns of a group that one program keeps in registers; ptxas spills twice as many


def round_gradient(x: Tensor, step: Tensor, limit: Tensor, levels: int, stream: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of a gradient, and how many magnitudes are beyond the limit.

    Args:
        x: float32 [N], contiguous.
        step: float32 [], on its device.
        limit: float32 [], on its device.
        levels: the largest code.
        stream: of the random values, int32 [] on its device; None: round to nearest.

    Returns:
        int8 [N] and int64 [].
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    beyond = torch.zeros((), dtype=torch.int64, device=x.device)
    spec = RoundGradient(stochastic=stream is not None)
    launch, n = launch_of(spec), x.numel()
    _run(
        spec, -(-n // launch.block_n), launch, x=x, step=step, limit=limit, stream=stream, codes=codes,
        beyond=beyond, levels=float(levels), N=n,
    )  # fmt: skip
    return codes, beyond


def round_values(x: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes of values, and whether there is a NaN.

    Args:
        x: float32 [N], contiguous.
        step: float32 [], on its device.
        low: the smallest code.
        high: the largest.

    Returns:
        int8 [N] and bool [].
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    lost = torch.zeros((), dtype=torch.bool, device=x.device)
    launch, n = launch_of(RoundValues()), x.numel()
    _run(
        RoundValues(), -(-n // launch.block_n), launch, x=x, step=step, codes=codes,
        lost=lost.view(torch.uint8), lowest=float(low), highest=float(high), N=n,
    )  # fmt: skip
    return codes, lost


def change_codes(
    codes: Tensor, scale: Tensor, zero: Tensor, change: Tensor, group: int, decay: float, stream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a weight [N, K] and a change of it.

    Args:
        codes: of the weight, uint8 [N, K]; this and the others contiguous, on one device.
        scale: float32 [N, groups].
        zero: uint8 [N, groups].
        change: float32 [N, K].
        group: columns that share a scale, up to MAX_GROUP.
        decay: the share of the weight that is taken away.
        stream: of the random values, int32 []; None: round to nearest.

    Returns:
        The same three of the sum, and whether a group of it is not finite, bool [].
    """
    new_codes, new_scale, new_zero = torch.empty_like(codes), torch.empty_like(scale), torch.empty_like(zero)
    bad = torch.zeros((), dtype=torch.bool, device=codes.device)
    spec = ChangeCodes(group=group, decay=bool(decay), stochastic=stream is not None)
    launch = change_launch(spec)
    _run(
        spec, -(-scale.numel() // launch.block_m), launch, change=change, old_codes=codes,
        old_scale=scale, old_zero=zero, stream=stream, codes=new_codes, scale=new_scale, zero=new_zero,
        bad=bad.view(torch.uint8), keep=1.0 - decay, K=codes.shape[1], groups=scale.shape[1], count=scale.numel(),
    )  # fmt: skip
    return new_codes, new_scale, new_zero, bad


def change_launch(spec: ChangeCodes) -> Launch:
    """Some 1024 values a program of four warps; a longer group has more warps."""
    return Launch(max(1, 1024 // spec.width), spec.width, max(4, min(32, spec.width // 512)), 1)


def _run(spec: KernelSpec, programs: int, launch: Launch, **arguments: Any) -> None:
    if not programs:
        return
    function = kernel(spec)
    names = function.arg_names
    own = {name: arguments[name] for name in names if name in arguments}
    with torch.cuda.device(arguments["codes"].get_device()):  # the current one may be another
        function[(programs,)](**own, **launch.constants(names), **compiler_options(spec, launch))
