"""Who takes part when products are timed: cuBLAS, our kernels, torch's own, and GemLite where it is installed.

All multiply by several copies of a weight, made once for a shape and used for every number of rows. Each is made when
it is its turn, so that one that does not take a shape, or is not there, leaves a word and stops nobody else.
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
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FIRST = "cuBLAS bf16"  # what the others are compared with


class Absent(Exception):
    """A contender that is not here, and why."""


@dataclass(frozen=True)
class Contender:
    """A product: `call(i)` multiplies by copy i of the weight, and reads and writes `nbytes`."""

    call: Callable[[int], Any]
    nbytes: int


@dataclass(frozen=True)
class Field:
    """Random weights [N, K] of all kinds, `copies` of each, made when first asked for."""

    k: int
    n: int
    copies: int
    device: torch.device

    @cached_property
    def dense(self) -> list[Tensor]:
        """bf16."""
        return [self.random(self.n, self.k).bfloat16() / self.k**0.5 for _ in range(self.copies)]

    @cached_property
    def int4(self) -> list[PackedWeight]:
        """As gemm_w reads them."""
        weight = random_weight(INT4, self.k, self.n, self.device)
        return [dataclasses.replace(weight, packed=weight.packed.clone()) for _ in range(self.copies)]

    @cached_property
    def int8(self) -> list[Tensor]:
        """Codes."""
        return [self.codes("int8", self.n) for _ in range(self.copies)]

    @cached_property
    def fp8(self) -> list[Tensor]:
        """Codes."""
        return [self.codes("fp8", self.n) for _ in range(self.copies)]

    @cached_property
    def tinygemm(self) -> tuple[list[Tensor], Tensor]:
        """torch's int4 layout, and scales with zero points."""
        bits = torch.randint(0, 256, (self.n, self.k // 2), dtype=torch.uint8, device=self.device)
        packed = [torch._convert_weight_to_int4pack(bits, 8) for _ in range(self.copies)]
        return packed, torch.rand(self.k // 128, self.n, 2, device=self.device).bfloat16()

    @cached_property
    def gemlite(self) -> list[Any]:
        """Its layers. Raises Absent."""
        try:
            from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found]
        except ImportError as error:
            raise Absent(f"GemLite is not installed: pip install gemlite ({error})") from None
        made = []
        for _ in range(self.copies):
            layer = GemLiteLinear(
                4, group_size=128, in_features=self.k, out_features=self.n, input_dtype=DType.BF16,
                output_dtype=DType.BF16,
            )  # fmt: skip
            codes = torch.randint(0, 16, (self.n, self.k), dtype=torch.uint8, device=self.device)
            scales = self.random(self.n * self.k // 128, 1).abs().bfloat16() / self.k**0.5
            layer.pack(codes, scales, torch.full_like(scales, 8), None)
            made.append(layer)
        return made

    def random(self, *shape: int) -> Tensor:
        """Normal numbers, float32."""
        return torch.randn(*shape, device=self.device)

    def codes(self, kind: str, rows: int) -> Tensor:
        """[rows, K] int8 or fp8."""
        return (self.random(rows, self.k) * 30).to(CODES[kind])


def random_weight(form: Format, k: int, n: int, device: torch.device) -> PackedWeight:
    """A random quantized weight [N, K] on a device, as the kernels read it."""
    q = quantize_tensor(torch.randn(n, k, device=device) / k**0.5, form)
    layout = layout_of(form)
    assert layout is not None
    return PackedWeight(*prepare(q.stored(), q.scale, q.zero, q.group_scale, form, k), layout, k)


def contenders(field: Field, m: int) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Names, and what makes each for x [m, K]; cuBLAS bf16 first. A call raises where a contender takes no part."""
    k, n = field.k, field.n
    moved = 2 * m * (k + n)
    x = field.random(m, k).bfloat16()
    steps, channel = (torch.rand(size, 1, device=field.device) for size in (m, n))

    def ours() -> Contender:
        one = field.int4[0]
        assert one.zero is not None
        nbytes = one.packed.nbytes + one.scale.nbytes + one.zero.nbytes + moved
        return Contender(lambda i: linear_w(x, field.int4[i], Epilogue()), nbytes)

    def eight(kind: str) -> Callable[[], Contender]:
        def make() -> Contender:
            codes, tables = field.codes(kind, m), getattr(field, kind)
            nbytes = n * k + m * k + 2 * m * n
            return Contender(lambda i: linear_a8(codes, steps, tables[i], channel, Epilogue(), torch.bfloat16), nbytes)

        return make

    def tinygemm() -> Contender:
        packed, scales = field.tinygemm
        nbytes = n * k // 2 + scales.nbytes + moved
        return Contender(lambda i: torch._weight_int4pack_mm(x, packed[i], 128, scales), nbytes)

    def int_mm() -> Contender:
        if m <= 16:
            raise Absent("torch._int_mm takes more than 16 rows")
        codes = field.codes("int8", m)
        return Contender(lambda i: torch._int_mm(codes, field.int8[i].t()), n * k + m * k + 4 * m * n)

    def scaled_mm() -> Contender:
        codes = field.codes("fp8", m)

        def call(i: int) -> Tensor:
            return torch._scaled_mm(codes, field.fp8[i].t(), steps, channel.t(), out_dtype=torch.bfloat16)

        return Contender(call, n * k + m * k + 2 * m * n)

    def gemlite() -> Contender:
        layers = field.gemlite
        return Contender(lambda i: layers[i](x), n * k // 2 + n * k // 128 * 4 + moved)

    yield FIRST, lambda: Contender(lambda i: torch.nn.functional.linear(x, field.dense[i]), 2 * n * k + moved)
    yield "qcompile w4a16", ours
    yield "qcompile int8", eight("int8")
    yield "qcompile fp8", eight("fp8")
    yield "torch._weight_int4pack_mm", tinygemm
    yield "torch._int_mm", int_mm
    yield "torch._scaled_mm", scaled_mm
    yield "GemLite w4a16", gemlite
