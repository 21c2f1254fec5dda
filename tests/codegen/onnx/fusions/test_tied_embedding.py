"""Tied embeddings gather from the codes of the logits, unless those are no quantization of their table."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx_models import load_graph
from torch import nn
from zoo import build

import qcompile
from qcompile.numerics.format import Format
from qcompile.passes import FoldNorm, Fuse, Quantize, Rotate, Untie
from qcompile.recipe.recipe import Recipe


@pytest.mark.parametrize("form", ["int4/group32/zero", "int8"])
def test_a_table_in_another_basis_is_the_codes_times_a_matrix(form, tmp_path):
    """Folding the last norm and rotating untie the logits' weight: one table in the file all the same."""
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2)
    small = Quantize(Format.parse(form), None, lm_head=Format.parse(form), clip=True)
    recipe = Recipe("rotated", (Untie(), FoldNorm(), Rotate(), small, Fuse()))
    report = qcompile.export_onnx(model, tmp_path / "m", recipe, accuracy_level=1, progress=False)
    graph, counts = load_graph(tmp_path / "m")
    assert counts["GatherBlockQuantized"] == 1 and counts["Gather"] == 0
    assert report.metrics["onnx relative error"] < 1e-5  # to the module that holds codes times the matrix
    sizes = [np.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(sizes) == 64 * 64 if form == "int8" else max(sizes) < 64 * 64  # behind 4-bit codes it has 8 bits


def test_the_preset_with_rotated_bases_holds_one_table(tmp_path):
    """Its codes of the logits are chosen by GPTQ, not by the table: still near enough behind a matrix."""
    batches = [{"input_ids": torch.randint(0, 128, (4, 32))} for _ in range(4)]
    options = dict(low_memory=True, progress=False)
    report = qcompile.export_onnx(build("llama"), tmp_path / "m", "int4-cpu-gptq", batches, **options)
    counts = load_graph(tmp_path / "m")[1]
    assert counts["GatherBlockQuantized"] == 1 and counts["Gather"] == 0
    assert any("codes of the logits and multiplied by a matrix" in n for p in report.passes for n in p.notes)


@pytest.mark.parametrize("form,products,matrix", [("int4/group32/zero", 3, [64, 1, 64]), ("int8", 1, [64, 64])])
def test_two_embeddings_of_one_rotated_table_share_its_matrix(form, products, matrix, tmp_path):
    """Its matrix is not symmetric, unlike those that folding norms makes: transposed it would be another."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(256, 64), nn.Linear(64, 256, bias=False)
            self.head.weight.data = self.table.weight @ torch.linalg.qr(torch.randn(64, 64)).Q

        def forward(self, first, second):
            return self.head(self.table(first) * self.table(second))

    torch.manual_seed(0)
    small = Format.parse(form)
    ids = torch.arange(6).reshape(2, 3)
    example = dict(first=ids, second=ids + 9)
    options = dict(accuracy_level=1, progress=False, example=example)
    recipe = Recipe("small", (Quantize(small, None, lm_head=small), Fuse()))
    report = qcompile.export_onnx(Twice(), tmp_path / "m", recipe, **options)
    graph, counts = load_graph(tmp_path / "m")
    assert counts["GatherBlockQuantized"] == 2 and report.metrics["onnx relative error"] < 1e-5
    assert counts["MatMulNBits"] == products and [list(t.dims) for t in graph.initializer].count(matrix) == 1


@pytest.mark.parametrize("change", ["untied", "flipped"])
def test_a_table_that_the_codes_are_no_rounding_of_is_kept(change, tmp_path):
    """Verification puts the shared table's values into the module: it cannot find a table shared by mistake."""
    model = build("llama")
    if change == "untied":
        model.lm_head.weight = nn.Parameter(torch.randn(128, 64) * 0.02, requires_grad=False)
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0), requires_grad=False)
    for form in ("int4/group32/zero", "int8"):
        small = Quantize(Format.parse(form), None, lm_head=Format.parse(form), clip=True)
        folder = tmp_path / form.replace("/", "-")
        qcompile.export_onnx(model, folder, Recipe("small", (small, Fuse())), progress=False)
        assert load_graph(folder)[1]["GatherBlockQuantized"] == 0


def test_a_table_of_two_bits_is_kept(tmp_path):
    """MatMulNBits reads such codes, GatherBlockQuantized does not."""
    form = Format.parse("int2/group32/zero")
    small = Recipe("small", (Quantize(form, None, lm_head=form), Fuse()))
    report = qcompile.export_onnx(build("llama"), tmp_path / "m", small, accuracy_level=1, progress=False)
    graph, counts = load_graph(tmp_path / "m")
    bits = {a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}
    assert bits == {2} and counts["GatherBlockQuantized"] == 0 and report.metrics["onnx relative error"] < 1e-5
