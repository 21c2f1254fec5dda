"""The kernels of training on a GPU as training calls them, in Triton's interpreter; where there are none it says so."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE

from qcompile.codegen.triton import gpu_rounding
from qcompile.codegen.triton.gpu_rounding import GpuRounding, install_gpu_rounding
from qcompile.numerics import code_rounding
from qcompile.numerics.code_rounding import changed_codes, gradient_codes, install_rounding_kernels, value_codes
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of a NaN

DRAW = torch.tensor(7, dtype=torch.int32)


def moved(weight, device):
    return QTensor(*(None if part is None else part.to(device) for part in weight.parts), weight.format)


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.setattr(code_rounding, "_installed", {})
    install_gpu_rounding.cache_clear()
    yield
    install_gpu_rounding.cache_clear()


@pytest.fixture(scope="module")
def kernels():
    return GpuRounding(DEVICE)


def test_training_gets_what_the_definitions_give(kernels):
    x, step = torch.randn(5000), torch.tensor(0.2)
    weight = quantize_tensor(torch.randn(5, 300), Format.parse("int8/group256/zero"))
    change = torch.randn(5, 300) * 1e-2

    def outcomes(device):
        old = moved(weight, device)
        yield from gradient_codes(x.to(device), step.to(device), 7 * step.to(device), 7, DRAW.to(device))
        yield from value_codes(x.to(device), step.to(device), -7, 7)
        yield from changed_codes(old, change.to(device), 0.01, DRAW.to(device)).parts[:3]

    want = list(outcomes("cpu"))
    install_rounding_kernels(DEVICE, kernels)
    for a, b in zip(outcomes(DEVICE), want, strict=True):
        assert torch.equal(a.cpu(), b) and a.dtype == b.dtype


@pytest.mark.parametrize("form", ["int8/group256", "int8/row", "int4/group32/zero", "int8/group64/floatzero",
                                  "int8/group20000/zero"])  # fmt: skip
def test_formats_without_a_kernel_are_left_to_the_definition(form, kernels):
    columns = 10_000 if "20000" in form else 300
    weight = quantize_tensor(torch.randn(2, columns), Format.parse(form))
    assert kernels.changed_codes(moved(weight, DEVICE), torch.zeros(2, columns, device=DEVICE), 0.0, None) is None


@pytest.mark.parametrize("columns", [1, 17, 200, 256, 257])
def test_a_group_beyond_the_row_is_one_group_of_it(columns, kernels):
    form = Format.parse("int8/group256/zero")
    weight, change = quantize_tensor(torch.randn(3, columns), form), torch.randn(3, columns)
    got = kernels.changed_codes(moved(weight, DEVICE), change.to(DEVICE), 0.0, DRAW)
    want = changed_codes(weight, change, 0.0, DRAW)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got.parts[:3], want.parts[:3], strict=True))


def test_a_change_that_no_code_holds_is_an_error(kernels):
    weight = quantize_tensor(torch.randn(4, 300), Format.parse("int8/group256/zero"))
    change = torch.full((4, 300), 0.1, device=DEVICE)
    change[2, 290] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf, which no code can hold"):
        kernels.changed_codes(moved(weight, DEVICE), change, 0.0, None)


def test_kernels_are_installed_for_cuda(monkeypatch):
    monkeypatch.setattr(gpu_rounding, "GpuRounding", lambda: "kernels")
    install_gpu_rounding()
    assert code_rounding._installed == {"cuda": "kernels"}


def test_kernels_are_tried_before_they_are_used(monkeypatch):
    calls = []
    monkeypatch.setattr(GpuRounding, "value_codes", lambda self, x, *rest: calls.append(x.device.type))
    GpuRounding("cpu")
    assert calls == ["cpu"]


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"), RuntimeError("Failed to find C compiler")])
def test_a_machine_without_triton_says_so_and_trains(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(gpu_rounding, "GpuRounding", fail)
    with pytest.warns(UserWarning, match=rf"do not run here \({error}\), so PyTorch rounds.*pip install triton"):
        install_gpu_rounding()
    assert code_rounding._installed == {}
