"""Run row_quant: a norm or a gate, smoothing and a Hadamard transform, then codes and scales of each row."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.render import padded
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.numerics.hadamard import hadamard_factors, hadamard_matrix

MAX_K = 32768  # values of a row that one program keeps in registers


def row_quant(spec: RowQuant, x: Tensor, eps: float = 0.0, **tensors: Tensor) -> dict[str, Tensor]:
    """Quantize the rows of x [M, K].

    Args:
        spec: what to compute.
        x: bf16 or fp16, contiguous.
        eps: of the norm.
        tensors: residual, gate [M, K], gain, shift, smooth, signs [K], those that the spec has.

    Returns:
        codes [M, K] (int4: uint8 [M, K / 2]), scale [M, groups] float32; total [M, K] if there is a residual, value
        [M, K] if the spec writes it, both in x's dtype.
    """
    m, k = x.shape
    code_dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[spec.codes]
    results = dict(
        codes=torch.empty(m, k // 2 if spec.codes == "int4" else k, dtype=code_dtype, device=x.device),
        scale=torch.empty(m, -(-k // spec.group) if spec.group else 1, device=x.device),
    )
    results |= {name: torch.empty_like(x) for name in ("total",) * spec.residual + ("value",) * spec.value}
    if not m:
        return results
    arguments: dict[str, Any] = dict(x=x, eps=eps, K=k, BLOCK=1 << (k - 1).bit_length(), **tensors, **results)
    if spec.hadamard:
        arguments["left"], arguments["right"] = transform_matrices(spec, x.device)
    run = kernel(spec)
    own = {name: arguments[name] for name in run.arg_names}
    with torch.cuda.device(x.get_device()):  # the current one may be another
        run[(m,)](**own, num_warps=num_warps(spec, k), num_stages=1)
    return results


def num_warps(spec: RowQuant, k: int) -> int:
    """Some 16 values a thread; the matmuls of a transform take four warps, or eight.

    Half as many values a thread where `value` is written too: with more, ptxas spills some (sm_90, sm_100).
    """
    if spec.hadamard:
        return 4 if spec.hadamard <= 4096 else 8
    each = 256 if spec.value else 512
    return max(1, min(32, 1 << (k // each).bit_length() - 1)) if k >= each else 1


def fuses_hadamard(n: int, capability: tuple[int, int]) -> bool:
    """Whether a transform of n channels fits into row_quant on a GPU: into the registers of one program.

    On sm_100 triton 3.6 fails on its matmuls.
    """
    split = hadamard_factors(n)
    if split is None or split[1] < 4 or capability >= (10, 0):
        return False
    spec = RowQuant(hadamard=n)
    return padded(spec.left) * spec.right <= (16384 if capability >= (9, 0) else 8192)


@functools.lru_cache(maxsize=32)
def transform_matrices(spec: RowQuant, device: torch.device) -> tuple[Tensor, Tensor]:
    """H_left^T, padded with zeros, and H_right, with H_n = H_left (x) H_right; entries of +-1 in bfloat16."""
    left = hadamard_matrix(spec.left).t()
    side = padded(spec.left)
    wide = torch.zeros(side, side, dtype=torch.bfloat16)
    wide[: spec.left, : spec.left] = left
    return wide.to(device), hadamard_matrix(spec.right).bfloat16().to(device)
