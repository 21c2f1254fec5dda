from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import nn

import qcompile
from qcompile.codegen.onnx import verify_outputs
from qcompile.codegen.onnx.fusions.quantized_embedding import QuantizedEmbedding
from qcompile.codegen.onnx.tracing.stateless_module import StatelessModule
from qcompile.codegen.onnx.verify_outputs import (
    ExportMismatch,
    Reference,
    dequantized_weights,
    float_activations,
    measure_error,
    quantized_embeddings,
    reference,
    relative_error,
    verify,
)
from qcompile.modules.quant_linear import QuantLinear


def quantized(recipe: str) -> StatelessModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)).eval().requires_grad_(False)
    x = torch.randn(4, 32)
    qcompile.quantize(model, recipe, example=x, progress=False)
    return StatelessModule(model, x)


def file_of_one_add(path, addend: float) -> None:
    """y = x + addend."""
    x, y = (ir.val(name, ir.DataType.FLOAT, ["batch", 4]) for name in ("input", "output"))
    constant = ir.node("Constant", [], {"value_float": addend})
    nodes = [constant, ir.node("Add", [x, constant.outputs[0]], outputs=[y])]
    graph = ir.Graph([x], [y], nodes=nodes, opset_imports={"": 21}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)


def test_a_file_is_within_its_tolerance_or_refused(tmp_path):
    x = torch.ones(2, 4)
    module = StatelessModule(nn.Identity(), x)
    expected = Reference([((x,), [x])], [0.1])
    file_of_one_add(tmp_path / "near.onnx", 0.05)
    assert verify(tmp_path / "near.onnx", module, expected) == pytest.approx(0.05, rel=1e-3)
    file_of_one_add(tmp_path / "far.onnx", 0.2)
    with pytest.raises(ExportMismatch, match=r"output output differs from the module by 2.00e-01 \(allowed 1.00e-01\)"):
        verify(tmp_path / "far.onnx", module, expected)
    assert measure_error(tmp_path / "far.onnx", module, expected) == pytest.approx(0.2, rel=1e-3)
    file_of_one_add(tmp_path / "nan.onnx", float("nan"))
    with pytest.raises(ExportMismatch):
        verify(tmp_path / "nan.onnx", module, expected)


def test_a_file_that_does_not_run_for_other_sizes_is_refused_in_one_line(tmp_path):
    """As one whose graph holds the length of the example."""
    module, longer = StatelessModule(nn.Identity(), torch.ones(2, 4)), torch.ones(2, 5)
    file_of_one_add(tmp_path / "fixed.onnx", 0.0)
    with pytest.raises(
        ExportMismatch, match=r"does not run for inputs of other sizes.*input \[2, 5\].*Fix: "
    ) as refused:
        verify(tmp_path / "fixed.onnx", module, Reference([((longer,), [longer])], [0.1]))
    assert "\n" not in str(refused.value)


def test_the_error_is_of_norms():
    want = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_the_tolerance_is_what_rounding_changes():
    """Of weights alone there is nothing to round twice: only sums in another order."""
    assert reference(quantized("w8a16"), lambda site: False).tolerances == [verify_outputs._SUMS]
    module = quantized("int8")
    rounded, float_ = reference(module, lambda site: False), reference(module, lambda site: True)
    (tolerance,) = rounded.tolerances
    change = max(relative_error(a[0], b[0]) for (_, a), (_, b) in zip(float_.calls, rounded.calls, strict=True))
    assert tolerance == pytest.approx(verify_outputs._ROUNDINGS * change, rel=0.2)
    assert float_.tolerances == [verify_outputs._SUMS]


def test_the_module_is_as_before_even_after_an_error():
    module = quantized("int8")
    sites = [m for m in module.modules() if isinstance(m, QuantLinear)]
    before = [site.act for site in sites]
    with pytest.raises(KeyError), float_activations(module, lambda site: site is sites[0]):
        assert [site.act for site in sites] == [None, before[1]]
        raise KeyError
    assert [site.act for site in sites] == before

    module = quantized("w8a16")
    sites, x = [m for m in module.modules() if isinstance(m, QuantLinear)], torch.randn(3, 32)
    want = module(x)[0]
    with pytest.raises(KeyError), dequantized_weights(module):
        assert not any(isinstance(m, QuantLinear) for m in module.modules())
        assert torch.allclose(module(x)[0], want, atol=1e-5)
        raise KeyError
    assert [m for m in module.modules() if isinstance(m, QuantLinear)] == sites


def test_embeddings_are_those_of_the_file_for_a_while():
    module = nn.Sequential(nn.Embedding(8, 4))
    table = module[0].weight
    before, values = table.data.clone(), torch.ones(8, 4)
    with torch.no_grad(), quantized_embeddings(module, [QuantizedEmbedding("0.weight", values)]):
        assert torch.equal(module(torch.tensor([3])), torch.ones(1, 4))
    assert module[0].weight is table and torch.equal(table.data, before)
