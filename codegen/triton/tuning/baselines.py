"""The linear layers that are timed: our kernels, and as baselines cuBLAS, torch's own and GemLite if it is installed.

All multiply by several copies of a weight, made once for a shape and used for every M. Each is made just before it is
timed, so that one that does not take a shape, or is not installed, leaves a note and stops no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.gemm import Epilogue, PackedWeight, linear_a8, linear_w
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

INT4 = Format.parse("int4/group128/zero")
CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CUBLAS = "cuBLAS bf16"  # the baseline of all ratios


class NotAvailable(Exception):
    """A linear layer that cannot be timed here, and why."""


@dataclass(frozen=True)
class TimedLinear:
    """A linear layer: `call(i)` multiplies by copy i of the weight, and reads and writes `nbytes`."""

    call: Callable[[int], Any]
    nbytes: int


@dataclass(frozen=True)
class WeightCopies:
    """Random weights [N, K] in every form that is timed, each made at its first use.

    Attributes:
        k: input channels.
        n: output channels.
        copies: of each weight, so many that they exceed the cache.
        device: that they are on.
    """

    k: int
    n: int
    copies: int
    device: torch.device

    @cached_property
    def generator(self) -> torch.Generator:
        """What all values are drawn from: the caller's own generators stay as they are."""
        return torch.Generator(self.device).manual_seed(0)

    @cached_property
    def dense(self) -> list[Tensor]:
        """bf16 [N, K]."""
        return [self.normal(self.n, self.k).bfloat16() / self.k**0.5 for _ in range(self.copies)]

    @cached_property
    def int4(self) -> list[PackedWeight]:
        """INT4, packed for gemm_w."""
        weight = random_packed_weight(INT4, self.k, self.n, self.device)
        return [cold_copy(weight) for _ in range(self.copies)]

    @cached_property
    def int8(self) -> list[Tensor]:
        """int8 codes [N, K]."""
        return [self.codes("int8", self.n) for _ in range(self.copies)]

    @cached_property
    def fp8(self) -> list[Tensor]:
        """fp8 (e4m3) codes [N, K]."""
        return [self.codes("fp8", self.n) for _ in range(self.copies)]

    @cached_property
    def tinygemm(self) -> tuple[list[Tensor], Tensor]:
        """torch's int4 layout, and scales with zero points."""
        bits = self.integers(256, self.n, self.k // 2)
        packed = [torch._convert_weight_to_int4pack(bits, 8) for _ in range(self.copies)]
        return packed, self.uniform(self.k // 128, self.n, 2).bfloat16()

    @cached_property
    def gemlite(self) -> list[Any]:
        """GemLite's int4 layers. Raises NotAvailable."""
        try:
            from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found]
        except ImportError as error:
            raise NotAvailable(f"GemLite is not installed: pip install gemlite ({error})") from None
        layers = []
        for _ in range(self.copies):
            layer = GemLiteLinear(
                4, group_size=128, in_features=self.k, out_features=self.n, input_dtype=DType.BF16,
                output_dtype=DType.BF16,
            )  # fmt: skip
            codes = self.integers(16, self.n, self.k)
            scales = self.normal(self.n * self.k // 128, 1).abs().bfloat16() / self.k**0.5
            layer.pack(codes, scales, torch.full_like(scales, 8), None)
            layers.append(layer)
        return layers

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed float32 values."""
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """float32 values from 0 to 1."""
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def integers(self, end: int, *shape: int) -> Tensor:
        """uint8 values below `end`."""
        return torch.randint(0, end, shape, dtype=torch.uint8, device=self.device, generator=self.generator)

    def codes(self, kind: str, rows: int) -> Tensor:
        """[rows, K] int8 or fp8."""
        return (self.normal(rows, self.k) * 30).to(CODE_DTYPES[kind])


def cold_copy(weight: PackedWeight) -> PackedWeight:
    """The same weight elsewhere in memory, its scales and zero points too: none lies in a cache when it is timed."""
    zero = None if weight.zero is None else weight.zero.clone()
    return dataclasses.replace(weight, packed=weight.packed.clone(), scale=weight.scale.clone(), zero=zero)


def random_weight(k: int, n: int, device: torch.device) -> Tensor:
    """float32 [N, K], the same at every call; no generator of the caller's is drawn from."""
    weight: Tensor = torch.randn(n, k, device=device, generator=torch.Generator(device).manual_seed(0)) / k**0.5
    return weight


def random_packed_weight(form: Format, k: int, n: int, device: torch.device) -> PackedWeight:
    """A random quantized weight [N, K] on a device, packed for the kernels."""
    q = quantize_tensor(random_weight(k, n, device), form)
    layout = layout_of(form)
    assert layout is not None
    return PackedWeight(*prepare(*q.stored_parts, form, k, torch.bfloat16), layout, k)


def timed_linears(weights: WeightCopies, m: int) -> Iterator[tuple[str, Callable[[], TimedLinear]]]:
    """Names, and what makes each for x [m, K]; cuBLAS bf16 first. A call raises where one cannot be timed."""
    k, n = weights.k, weights.n
    activation_bytes = 2 * m * (k + n)
    x = weights.normal(m, k).bfloat16()
    x_scale, scale = (weights.uniform(size, 1) for size in (m, n))

    def w4a16() -> TimedLinear:
        one = weights.int4[0]
        nbytes = one.packed.nbytes + one.scale.nbytes + activation_bytes  # the zero points are in the words of scale
        return TimedLinear(lambda i: linear_w(x, weights.int4[i], Epilogue()), nbytes)

    def a8(kind: str) -> Callable[[], TimedLinear]:
        def make() -> TimedLinear:
            codes, copies = weights.codes(kind, m), getattr(weights, kind)
            return TimedLinear(
                lambda i: linear_a8(codes, x_scale, copies[i], scale, Epilogue(), torch.bfloat16),
                n * k + m * k + 2 * m * n,
            )

        return make

    def tinygemm() -> TimedLinear:
        packed, scales = weights.tinygemm
        nbytes = n * k // 2 + scales.nbytes + activation_bytes
        return TimedLinear(lambda i: torch._weight_int4pack_mm(x, packed[i], 128, scales), nbytes)

    def int_mm() -> TimedLinear:
        if m <= 16:
            raise NotAvailable("torch._int_mm takes more than 16 rows")
        codes = weights.codes("int8", m)
        return TimedLinear(lambda i: torch._int_mm(codes, weights.int8[i].t()), n * k + m * k + 4 * m * n)

    def scaled_mm() -> TimedLinear:
        codes = weights.codes("fp8", m)

        def call(i: int) -> Tensor:
            return torch._scaled_mm(codes, weights.fp8[i].t(), x_scale, scale.t(), out_dtype=torch.bfloat16)

        return TimedLinear(call, n * k + m * k + 2 * m * n)

    def gemlite() -> TimedLinear:
        layers = weights.gemlite
        return TimedLinear(lambda i: layers[i](x), n * k // 2 + n * k // 128 * 4 + activation_bytes)

    def cublas() -> TimedLinear:
        return TimedLinear(lambda i: torch.nn.functional.linear(x, weights.dense[i]), 2 * n * k + activation_bytes)

    yield CUBLAS, cublas
    yield "qcompile w4a16", w4a16
    yield "qcompile int8", a8("int8")
    yield "qcompile fp8", a8("fp8")
    yield "torch._weight_int4pack_mm", tinygemm
    yield "torch._int_mm", int_mm
    yield "torch._scaled_mm", scaled_mm
    yield "GemLite w4a16", gemlite
