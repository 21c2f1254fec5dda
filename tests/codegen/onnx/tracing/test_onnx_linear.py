"""Every format of a quantized linear: the ONNX form against the module, and the file against both."""

from __future__ import annotations

import pytest
import torch
from quant_linears import linear
from torch import nn

import qcompile
from qcompile.codegen.onnx.tracing.onnx_linear import HadamardTransform, OnnxLinear, onnx_linears
from qcompile.codegen.onnx.tracing.onnx_support import OnnxUnsupportedError, has_int4_and_int8_kernels
from qcompile.codegen.onnx.verify_outputs import float_activations
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.static_quant import StaticQuantConv, StaticQuantLinear
from qcompile.numerics.code_convolution import ConvolutionShape
from qcompile.numerics.hadamard import apply_hadamard, random_signs

FORMATS = [
    ("int8/row", "int8/row"), ("int8/row", ""), ("int4/group32", ""), ("int4/group32/zero", ""),
    ("int4/group32/floatzero", ""), ("int4/group32/zero/dual", "int8/row"), ("int4/group32", "int4/row"),
    ("int4/group32/zero/dual", "int4/row"), ("int4/row", ""), ("int8/row", "int8/tensor"),
    ("int4/group32/zero/dual", "int8/tensor"), ("int4/group32/dual", "int8/row"), ("int4/group32/dual", "int4/row"),
    ("int8/row", "int8/row/zero"), ("int8/row", "int8/tensor/zero"), ("int4/group32/zero", "int8/row/zero"),
    ("int4/group32/dual", "int8/row/zero"), ("int4/group32", "int4/tensor/zero"),
    ("int2/group32/zero", ""), ("int2/group16", ""), ("int2/group32/floatzero", ""), ("int2/group64", "int8/row"),
]  # fmt: skip


@pytest.mark.parametrize("form,act", FORMATS)
@pytest.mark.parametrize("columns,bias,signs", [(80, False, False), (96, True, True)])
def test_formats(form, act, columns, bias, signs, tmp_path):
    model = nn.Sequential(linear(form, act, columns, bias, signs))
    x = torch.randn(2, 3, columns)
    x[1, 2] = 0  # its scale would be zero
    x[0, 0], x[0, 1] = x[0, 0].abs(), -x[0, 1].abs() - 1  # of one sign: ranges with zero points end at zero
    for contrib_ops in (True, False):
        if not contrib_ops and ("floatzero" in form or "int2" in form):
            with pytest.raises(OnnxUnsupportedError, match="DequantizeLinear"):
                qcompile.export_onnx(model, tmp_path / "m", example=x, contrib_ops=False)
            continue

        def keeps_float(site, contrib_ops=contrib_ops):
            return not contrib_ops and has_int4_and_int8_kernels(site)

        with torch.no_grad(), float_activations(model, keeps_float):
            error = float((OnnxLinear(model[0], contrib_ops)(x) - model(x)).abs().max())
        assert error < 1e-4
        folder = tmp_path / str(contrib_ops)
        report = qcompile.export_onnx(model, folder, example=x, contrib_ops=contrib_ops, progress=False)
        assert report.metrics["onnx relative error"] < 1e-3 and report.metrics["onnx relative error as run"] < 0.05
    assert isinstance(model[0], QuantLinear)


@pytest.mark.parametrize("n", [1, 12, 64, 96])
def test_the_hadamard_transform_is_the_one_of_the_dialect(n):
    signs, x = random_signs(n, 3).float(), torch.randn(2, 5, n)
    assert torch.allclose(HadamardTransform(signs)(x), apply_hadamard(x, signs), atol=1e-5)


def test_the_originals_come_back_even_after_an_error():
    quantized, rotated = linear("int8/row", "", 64), RotatedLinear(nn.Linear(64, 8), random_signs(64, 0).float())
    model = nn.Sequential(quantized, nn.Sequential(rotated))
    with pytest.raises(RuntimeError, match="stop"), onnx_linears(model, contrib_ops=True):
        assert isinstance(model[0], OnnxLinear) and isinstance(model[1][0][0], HadamardTransform)
        raise RuntimeError("stop")
    assert model[0] is quantized and model[1][0] is rotated


@pytest.mark.parametrize("form", ["int8/row", "int4/group32/zero"])
def test_an_owner_reads_the_same_weight_while_it_is_traced(form):
    quantized, rotated = linear(form, "", 64), RotatedLinear(nn.Linear(64, 8), random_signs(64, 0).float())
    model, want = nn.Sequential(quantized, rotated), [quantized.weight, rotated.weight]
    with onnx_linears(model, contrib_ops=True):
        assert all(torch.equal(module.weight, weight) for module, weight in zip(model, want, strict=True))


@pytest.mark.parametrize("low,high", [(-7, 7), (0, 15)])
def test_static_activations(low, high, tmp_path):
    """A linear and a convolution with static activations: the file rounds them as the modules do."""
    act, shape = (torch.tensor(0.3), low, high), ConvolutionShape((2,), (1,), (1,), 2)
    codes = [torch.randint(-7, 8, size, dtype=torch.int8) for size in ((8, 2, 3), (6, 32))]
    model = nn.Sequential(
        StaticQuantConv.of(codes[0], 4, torch.tensor(0.2), torch.randn(8), act, shape),
        nn.Flatten(),
        StaticQuantLinear.of(codes[1], 4, torch.tensor(0.1), None, act),
    ).eval()
    x = torch.randn(3, 4, 8)
    report = qcompile.export_onnx(model, tmp_path / "m", example=x, progress=False)
    assert report.metrics["onnx relative error"] < 1e-5
    assert all(module.rounds for module in (model[0], model[2])) and isinstance(model[2], StaticQuantLinear)
    with onnx_linears(model, True):
        assert not isinstance(model[2], StaticQuantLinear)
