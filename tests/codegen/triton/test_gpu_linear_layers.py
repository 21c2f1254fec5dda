"""Linear layers that share their input are one product, with the bits of products of their own."""

from __future__ import annotations

import pytest
import torch
from lowered_programs import counts, lowered, lowered_module
from zoo import build, example

from qcompile.codegen.triton import gpu_linear_layers
from qcompile.codegen.triton.triton_op_calls import LinearA8Call
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, LoRC, Quantize
from qcompile.recipe.recipe import Recipe

INT8 = Format("int8")


class Branches(torch.nn.Module):
    """Three linear layers of one value, the last of which has no bias; the result of the second is added to."""

    def __init__(self, added=False):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(64, 24), torch.nn.Linear(64, 40), torch.nn.Linear(64, 16, bias=False)
        self.added = added

    def forward(self, x):
        b = self.b(x)
        return self.a(x), b + 1.0 if self.added else b, self.c(x)


def recipe_of(weight, act):
    form = Format.parse(weight)
    return Recipe("one", (Quantize(form, act, lm_head=form, lm_head_act=act), Fuse()))


@pytest.mark.parametrize("weight,act", [("int8", INT8), ("int4/group32/zero", None), ("int4/group32/zero/dual", INT8)])
def test_one_product_gives_each_site_its_channels(weight, act, monkeypatch):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).half()
    _, merged = lowered_module(Branches(), x, recipe_of(weight, act))
    monkeypatch.setattr(gpu_linear_layers, "find_siblings", one_by_one(gpu_linear_layers.find_siblings))
    torch.manual_seed(0)
    program, apart = lowered_module(Branches(), x, recipe_of(weight, act))
    assert (products(merged), products(apart)) == (2, 3)  # the third has no bias, and stays alone
    for got, own, want in zip(merged(x), apart(x), program(x), strict=True):
        assert got.shape == own.shape and torch.allclose(own, want, atol=2e-2)


def products(program):
    return sum(count for kind, count in counts(program).items() if kind.startswith("linear"))


def one_by_one(find):
    return lambda program: [
        type(siblings)((node,), (call,))
        for siblings in find(program)
        for node, call in zip(siblings.nodes, siblings.calls, strict=True)
    ]


@pytest.mark.parametrize("name,recipe", [("llama", "int8"), ("llama", "w4a16"), ("gpt_neox", "w4a8"), ("bert", "int8")])
def test_models_have_the_same_bits_merged_and_apart(name, recipe, monkeypatch):
    _, merged, inputs, _ = lowered(build(name).half(), example(name), recipe)
    monkeypatch.setattr(gpu_linear_layers, "find_siblings", one_by_one(gpu_linear_layers.find_siblings))
    _, apart, _, _ = lowered(build(name).half(), example(name), recipe)
    assert products(merged) < products(apart) or name == "gpt_neox"  # whose q, k and v are one weight
    assert torch.equal(merged(*inputs)[0], apart(*inputs)[0])


def test_what_an_epilogue_adds_to_stays_alone():
    program, found = lowered_module(Branches(added=True), torch.randn(3, 64).half(), recipe_of("int8", INT8))
    assert len(list(LinearA8Call.find(found))) == 3


def test_corrections_stay_epilogues():
    int4 = Format.parse("int4/group32/zero")
    recipe = Recipe("lorc", (Quantize(int4, None), LoRC(rank=4), Fuse()))
    assert counts(lowered(build("llama").half(), example("llama"), recipe)[1])["up"] == 15


def test_rows_of_one_product_are_read_where_they_are():
    """silu(gate) * up of one product: row_quant reads both parts in the rows of the whole."""
    from qcompile.codegen.triton.launch.row_quant import row_stride

    whole = torch.randn(2, 5, 96)
    gate, up = whole[..., :64], whole[..., 64:]
    assert row_stride(whole) == row_stride(gate) == row_stride(up) == 96
    assert row_stride(whole[:, :1, :64]) == 5 * 96 and row_stride(whole[:1, :1, :64]) in (64, 96)
    assert row_stride(whole.transpose(0, 1)) == 0 and row_stride(whole[..., ::2]) == 0
    assert row_stride(torch.zeros(1, 8).expand(4, 8)) == row_stride(torch.zeros(2, 1, 8).expand(2, 3, 8)) == 0
    assert row_stride(torch.zeros(1, 3, 8).expand(2, 3, 8)) == 0
    assert row_stride(whole.transpose(1, 2)) == 0 and row_stride(whole[:, ::2]) == 0
