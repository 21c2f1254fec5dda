"""What kernels compute, and what a spec derives from its fields."""

from __future__ import annotations

import pytest

from qcompile.codegen.triton.kernels.spec import Dequant, Gemm8, GemmW, KernelSpec, Pack, RowQuant, SumK


def test_a_transform_is_two_small_matmuls():
    for n in (64, 320, 4096, 14336):
        spec = RowQuant(hadamard=n)
        assert spec.left * spec.right == n and spec.right & (spec.right - 1) == 0 and spec.right >= 16


@pytest.mark.parametrize("kind", [Dequant, Gemm8, GemmW, Pack, RowQuant, SumK])
def test_no_kernel_of_inference_computes_in_float32(kind: type[KernelSpec]):
    with pytest.raises(ValueError, match=f"there is {kind.template} for bf16, fp16"):
        kind("fp32")
    assert not kind.exact
