"""What is fused into row_quant before the codes, and what it writes beside them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lowered_programs import counts, fake_outputs, lowered, lowered_module, row_quants
from zoo import build, example

from qcompile.codegen.triton.triton_op_calls import RowQuantCall
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, OnlineHadamard, Quantize
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

INT8 = Format("int8")
ALL = (Quantize(INT8, INT8, lm_head=INT8, lm_head_act=INT8), Fuse())


def keeping(*patterns):
    """The int8 recipe with some sites kept float."""
    return dataclasses.replace(find_recipe("int8"), rules=tuple(Rule(p, keep=True) for p in patterns))


def agree(program, found, inputs):
    """The same outputs as the dialect's, but for values rounded to the next code; shapes also on a GPU."""
    for got, want in zip(found(*inputs), program(*inputs), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert float((got.float() - want.float()).norm()) < 1e-2 * float(want.float().norm())
    assert [tuple(o.shape) for o in fake_outputs(found, inputs)] == [tuple(o.shape) for o in found(*inputs)]


def fused(module, x, recipe=None):
    """What is fused in a module of the test's own, and the lowered program."""
    program, found = lowered_module(module, x, recipe or Recipe("all", ALL))
    agree(program, found, (x,))
    return counts(found), found


@pytest.mark.parametrize(
    "name,keep,want",
    [
        # a site that is kept float reads what the norm gives
        ("llama", ["*.q_proj.weight"], dict(rms=4, value=2, row_quant=8, gate=2, none=2, linear_a8=8, residual=4)),
        # linear layers that are kept float have no epilogue: the next norm's kernel adds the sum, where it is quantized
        ("llama", ["*.o_proj.weight", "*.down_proj.weight"],
         dict(rms=4, sum=3, row_quant=4, linear_a8=4, residual=0)),
        ("gpt2", ["*.attn.c_proj.weight"], dict(layer=4, sum=2, row_quant=6, none=2, linear_a8=6, residual=2)),
        # two norms of one sum
        ("gpt_neox", ["*.attention.dense.weight"], dict(layer=4, sum=1, row_quant=6, none=2, linear_a8=6, residual=2)),
    ],
)  # fmt: skip
def test_models_with_float_sites(name, keep, want):
    program, found, inputs, _ = lowered(build(name).half(), example(name), keeping(*keep))
    got = counts(found)
    assert {key: got.get(key, 0) for key in want} == want
    assert "dialect" not in got
    agree(program, found, inputs)


class Two(torch.nn.Module):
    """A norm that a linear layer and `read` read."""

    def __init__(self, read):
        super().__init__()
        self.read, self.norm, self.a = read, torch.nn.LayerNorm(64), torch.nn.Linear(64, 32)
        torch.nn.init.normal_(self.norm.bias)

    def forward(self, x):
        y = self.norm(x)
        early = self.read(y)  # before the quantize in the graph
        return self.a(y), early, y


def test_consumers_before_and_after_the_codes():
    got, found = fused(Two(lambda y: y.sin()), torch.randn(3, 64).half())
    assert got == dict(row_quant=1, layer=1, value=1, linear_a8=1)
    ((node, _),) = RowQuantCall.find(found)
    # nothing computes the norm a second time
    assert not found.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    assert {user.args[1] for user in node.users} == {0, 1, 3}


class Norms(torch.nn.Module):
    """Two norms of one sum, whose value is handed on too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.RMSNorm(64), torch.nn.RMSNorm(64)
        self.a, self.b, self.c = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        y = self.c(x) + x
        return self.a(self.first(y)), self.b(self.second(y)), y


def test_two_norms_of_one_sum_read_it_once():
    recipe = Recipe("two", ALL, (Rule("c.weight", keep=True),))
    got, found = fused(Norms(), torch.randn(3, 64).half(), recipe)
    assert got == dict(row_quant=2, rms=2, sum=1, linear_a8=2)
    assert not found.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)


class Both(Norms):
    """The sum and the norm are both read by others, the sum before the norm is computed."""

    def forward(self, x):
        y = self.c(x) + x
        early = y.cos()
        z = self.first(y)
        return self.a(z), early, z


def test_a_sum_and_a_norm_are_both_written():
    recipe = Recipe("both", ALL, (Rule("c.weight", keep=True),))
    got, _ = fused(Both(), torch.randn(3, 64).half(), recipe)
    assert got == dict(row_quant=1, rms=1, sum=1, value=1, linear_a8=1)


# -- vectors of channels -------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """Something, a vector of channels, a linear layer: how scales stand that no weight before them can take."""

    def __init__(self, before, operation, width=64):
        super().__init__()
        self.before, self.operation, self.a = before, operation, torch.nn.Linear(width, 32)
        self.norm, self.gate = torch.nn.RMSNorm(width), torch.nn.Linear(width, width)
        self.s = torch.nn.Parameter(torch.rand((1, width) if operation == "row" else width) * 20 + 0.05)

    def forward(self, x):
        if self.before == "norm":
            x = self.norm(x)
        elif self.before == "gate":
            x = torch.nn.functional.silu(self.gate(x)) * x
        elif self.before == "act":
            x = torch.nn.functional.gelu(x)
        return self.a({"*": lambda: x * self.s, "*r": lambda: self.s * x}.get(self.operation, lambda: x / self.s)())


@pytest.mark.parametrize("operation", ["/", "*", "*r", "row"])
@pytest.mark.parametrize("before,first", [("norm", "rms"), ("gate", "gate"), ("act", "none")])
def test_a_vector_of_channels_is_fused(before, first, operation):
    module = Scaled(before, operation)
    torch.nn.init.uniform_(module.norm.weight, 0.5, 2)
    rules = (Rule("gate.weight", keep=True),) if before == "gate" else ()
    got, found = fused(module, torch.randn(3, 64).half(), Recipe("all", ALL, rules))
    assert got == {"row_quant": 1, first: 1, "smooth": 1, "linear_a8": 1}
    remaining = {node.target for node in found.graph.nodes}
    assert not remaining & {torch.ops.aten.div.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.rms_norm.default}


class Shared(Scaled):
    """The scaled value is read by one linear layer, the norm itself by another, and the scaled value once more."""

    def __init__(self, twice):
        super().__init__("norm", "/")
        self.b, self.twice = torch.nn.Linear(64, 32), twice

    def forward(self, x):
        y = self.norm(x)
        z = y / self.s
        return (self.a(z), self.b(y), z) if self.twice else (self.a(z), self.b(y))


def test_values_before_a_vector_are_written_for_others():
    x = torch.randn(3, 64).half()
    # the norm's codes and the scaled ones are two: the first kernel writes the norm's value, the second reads it
    assert fused(Shared(False), x)[0] == dict(row_quant=2, rms=1, none=1, value=1, smooth=1, linear_a8=2)
    got, _ = fused(Shared(True), x)  # the scaled value stays a node of its own
    assert "smooth" not in got and got["row_quant"] == 2


def test_a_vector_before_a_transform():
    recipe = Recipe("hadamard", (OnlineHadamard(), *ALL))
    got, _ = fused(Scaled("norm", "*"), torch.randn(3, 64).half(), recipe)
    assert got == dict(row_quant=1, rms=1, smooth=1, hadamard=1, linear_a8=1)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "falcon", "bert"))]
)
def test_smoothing_recipes_have_no_vector_to_fuse(name):
    """SmoothQuant folds scales into weights or skips the site: no division is there to be fused."""
    _, found, _, _ = lowered(build(name).half(), example(name), "int8-smooth")
    specs = row_quants(found)
    assert specs and not any(spec.smooth for spec in specs)
