"""GELU and quantization in one: codes against float64, and which GELUs of a graph are replaced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.cpu.gelu_rows import fuse_gelu
from qcompile.codegen.cpu.native_kernels import load_native_kernels, ops
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import QuantizeCall

gelu = torch.nn.functional.gelu


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    load_native_kernels()


def exact_gelu(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """In float64, and without the cancellation of 1 + erf and 1 + tanh in their tails."""
    x = x.double()
    if tanh:
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return x * torch.special.erfc(-x / 2**0.5) / 2


def assert_codes(x: torch.Tensor, tanh: bool) -> None:
    """The nearest codes to gelu in float64, rounded to the dtype of x; a tie within its rounding may go either way."""
    codes, scale = ops.gelu_codes(x, tanh)
    assert codes.shape == x.shape and codes.dtype == torch.int8
    assert scale.shape == (*x.shape[:-1], 1) and scale.dtype == torch.float32
    exact = exact_gelu(x, tanh)
    # e^y of a y near -80 has the error of y; a value that is nearly a tie of bfloat16 is off by one of its steps.
    relative = 2e-5 if x.dtype == torch.float32 else 2.0**-8
    off = relative * exact.abs()
    largest = exact.abs().amax(-1, keepdim=True)
    wanted = torch.where(largest / 127 > 1.01e-30, largest / 127, 1.0)
    assert ((scale - wanted).abs() <= relative * wanted).all()
    assert ((codes * scale.double() - exact).abs() <= scale.double() * 0.50001 + off).all()
    rounded = torch.round(exact.to(x.dtype).double() / scale.double())
    assert (codes != rounded).sum() <= 0.01 * codes.numel() + 4


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1,), (3,), (2, 5), (0,), (40,)]),
    st.sampled_from([1, 3, 15, 16, 17, 64, 100, 768, 3072]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([1e-6, 1e-2, 1.0, 3.0, 100.0]),
    st.sampled_from([0.0, -4.0, -8.0, 5.0]),
    st.sampled_from([1, 2]),
)
def test_codes_are_those_of_float64(rows, k, dtype, tanh, spread, middle, threads):
    torch.manual_seed(k)
    x = (torch.randn(*rows, k) * spread + middle).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert_codes(x, tanh)
    assert_codes(x.t().contiguous().t() if x.ndim == 2 else x, tanh)
    torch.set_num_threads(before)


@pytest.mark.parametrize("tanh", [False, True])
def test_every_value_has_a_small_relative_error(tanh):
    """One value a row, so that its scale is its magnitude: the tail, where 1 + erf(x / sqrt 2) cancels, too."""
    x = torch.linspace(-11, 11, 20001)[:, None]
    _, scale = ops.gelu_codes(x, tanh)
    exact = exact_gelu(x, tanh)
    usual = exact.abs() > 1e-26
    error = (scale[usual] * 127 / exact[usual].abs() - 1).abs()
    assert error.max() < (2e-5 if tanh else 1e-5) and error[exact[usual].abs() > 1e-3].max() < 2e-6


def test_a_row_of_no_finite_values_leaves_the_others_alone():
    for bad in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, 70).to(dtype)
            codes, scale = ops.gelu_codes(x, False)
            x[1, 69] = bad
            others, scales = ops.gelu_codes(x, False)
            assert not scales[1].isfinite().any()
            assert torch.equal(codes[::2], others[::2]) and torch.equal(scale[::2], scales[::2])


def test_what_it_does_not_take_is_refused():
    for x in (
        torch.zeros(()),
        torch.zeros(3, 4).half(),
        torch.zeros(3, 4).double(),
        torch.zeros(3, 4, dtype=torch.int8),
    ):
        with pytest.raises(ValueError, match="qcompile_cpu::gelu_codes: x is .*float32 or bfloat16"):
            ops.gelu_codes(x, False)
        with (
            pytest.raises(ValueError, match="qcompile_cpu::gelu_codes: x is"),
            torch._subclasses.FakeTensorMode() as mode,
        ):
            ops.gelu_codes(mode.from_tensor(x), False)


def test_the_operator_is_well_behaved():
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.gelu_codes.default, (torch.randn(2, 3, 40), True), test_utils=checks)


class _Model(torch.nn.Module):
    def __init__(self, approximate="none", form="int8/row", also=False, written=False):
        super().__init__()
        self.approximate, self.form, self.also, self.written = approximate, form, also, written

    def forward(self, x):
        x = x * 2
        y = gelu(x, approximate=self.approximate)
        codes, scale, _ = torch.ops.qcompile.quantize(y, self.form)
        if self.written:
            x[:, 0] = 3.0
        return codes, scale, x, *([y] if self.also else [])


@pytest.mark.parametrize(
    "model,dtype,made",
    [
        (_Model(), torch.float32, 1),
        (_Model("tanh"), torch.bfloat16, 1),
        (_Model(), torch.float16, 0),
        (_Model(form="int8/tensor"), torch.float32, 0),
        (_Model(also=True), torch.float32, 0),
        (_Model(written=True), torch.float32, 0),
    ],
)
def test_which_are_replaced(model, dtype, made):
    x = torch.randn(3, 100).to(dtype)
    program = capture(model, (x,))
    assert fuse_gelu(program) == made
    program.graph_module.recompile()
    assert any(QuantizeCall.matches(node) for node in program.graph.nodes) == (not made)
    got, want = program(x), model(x)
    assert (got[0] == want[0]).double().mean() > 0.98 and torch.allclose(got[1], want[1], rtol=1e-2)
    assert torch.equal(got[2], want[2])


def test_the_kind_of_gelu_is_kept():
    x = torch.full((2, 16), -2.0)
    for model in (_Model(), _Model("tanh")):
        program = capture(model, (x,))
        assert fuse_gelu(program) == 1
        assert torch.allclose(program(x)[1], model(x)[1], rtol=1e-5)
