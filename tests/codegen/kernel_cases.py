"""Random operands of the Triton kernels, and bounds to float64: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import torch

from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

if DEVICE == "cpu":
    import interpreter  # noqa: F401  correct bfloat16


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def random_int8(*shape):
    """Codes of -127 .. 127, one tensor for each shape."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-127, 128, s, dtype=torch.int8, generator=generator).to(DEVICE) for s in shape]


def packed_weight(form, n, k, dtype=torch.float16, seed=1):
    """A packed weight and its dequantized values, [N, K] float64."""
    q = quantize_tensor(randn(n, k, seed=seed).cpu(), Format.parse(form))
    packed, scale, zero = (None if t is None else t.to(DEVICE) for t in prepare(*q.stored_parts, q.format, k, dtype))
    return PackedWeight(packed, scale, zero, layout_of(q.format), k), q.dequantize(torch.float64).to(DEVICE)


def random_epilogue(names, m, n, rank, dtype):
    tensors = dict(
        bias=randn(n, dtype=dtype, seed=2), residual=randn(m, n, dtype=dtype, seed=3),
        low=randn(m, rank, dtype=dtype, seed=4), up=randn(n, rank, dtype=dtype, seed=5),
    )  # fmt: skip
    return Epilogue(**{name: tensors[name] for name in names})


def epilogue_sum(epilogue):
    """What an epilogue adds, in float64."""
    total = 0.0
    for tensor in (epilogue.bias, epilogue.residual):
        total = total if tensor is None else total + tensor.double()
    return total if epilogue.up is None else total + epilogue.low.double() @ epilogue.up.double().t()


def assert_close(got, want, size, dtype, c):
    """|got - want| <= u |want| + c size, elementwise, and u of the norm; u is the unit roundoff, size is |x| |W|."""
    error = (got.double() - want).abs()
    assert not error.isnan().any()
    bound = UNIT_ROUNDOFF[dtype] * want.abs() + c * size + 1e-6
    assert bool((error <= bound).all()), float((error / bound).max())
    assert float(error.norm() / want.norm()) < UNIT_ROUNDOFF[dtype]
