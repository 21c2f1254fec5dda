"""GPTAQ's law: with the aim W*, matching the float model's output is GPTQ's own problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import rewrite
from torch import nn
from zoo import build, example

import qcompile
from qcompile.analysis.sites import find_sites
from qcompile.api.example_inputs import flat_inputs
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse
from qcompile.passes.weights.gptaq import GPTAQ, towards_float
from qcompile.passes.weights.gptq import GPTQ
from qcompile.passes.weights.sequential import as_rounded
from qcompile.recipe.recipe import Recipe

W3 = Format.parse("int3/group32/zero")


def inputs(seed, columns=24, rows=200):
    """Float inputs [T, K] and what a quantized model might give instead: scaled, mixed and noisy."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    exact = torch.randn(rows, columns, generator=g, dtype=torch.float64) @ mix
    drift = torch.eye(columns, dtype=torch.float64) * 0.9 + 0.05 * torch.randn(columns, columns, generator=g)
    return exact, exact @ drift + 0.3 * torch.randn(rows, columns, generator=g, dtype=torch.float64)


@given(st.integers(0, 2**20), st.integers(1, 9))
def test_matching_the_output_is_a_problem_of_weights(seed, rows):
    """|W X~ - Q X|^2 - |(W* - Q) X|^2 is the same for every Q, and nothing at Q = W* moves the output closer."""
    exact, drifted = inputs(seed)
    g = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(rows, 24, generator=g, dtype=torch.float64)
    aim = towards_float(weight, drifted.t() @ drifted, exact.t() @ drifted, damp_percent=1e-13)

    def apart(q):
        return float((exact @ weight.t() - drifted @ q.t()).square().sum())

    def weighted(q):
        return float((drifted @ (aim - q).t()).square().sum())

    tried = [torch.randn(rows, 24, generator=g, dtype=torch.float64) for _ in range(3)]
    rests = [apart(q) - weighted(q) for q in [weight, aim, *tried]]
    assert max(rests) - min(rests) <= 1e-8 * apart(weight)
    assert apart(aim) < 0.9 * apart(weight)
    assert all(apart(aim) <= apart(aim + 1e-3 * q) for q in tried)


def test_inputs_that_are_all_zero_move_nothing():
    weight, none = torch.randn(3, 5), torch.zeros(5, 5, dtype=torch.float64)
    assert torch.equal(towards_float(weight, none, none, damp_percent=0.01), weight)


@given(st.integers(0, 2**20), st.floats(0, 1))
def test_with_the_same_inputs_nothing_moves(seed, strength):
    exact, _ = inputs(seed)
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    hessian = exact.t() @ exact
    assert torch.equal(towards_float(weight, hessian, hessian, 0.01, strength), weight)


def test_strength_is_linear_and_zero_is_gptq():
    exact, drifted = inputs(3)
    weight = torch.randn(5, 24, dtype=torch.float64)
    moments = drifted.t() @ drifted, exact.t() @ drifted
    whole = towards_float(weight, *moments, 0.01)
    assert torch.allclose(towards_float(weight, *moments, 0.01, 0.5), (weight + whole) / 2)
    assert torch.equal(towards_float(weight, *moments, 0.01, 0.0), weight)


def programs(name, config):
    program = capture(build(name), (), example(name))
    batches = [flat_inputs(program, example(name), example(name)) for _ in range(2)]
    after = program.copy()
    rewrite(after, config, batches=batches)
    return program, after, batches


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_without_strength_the_grids_are_gptqs(name):
    _, ours, _ = programs(name, GPTAQ(W3, None, lm_head=None, strength=0.0))
    _, theirs, _ = programs(name, GPTQ(W3, None, lm_head=None))
    grids = [n for n in theirs.weights if n.endswith((".scale", ".zero"))]
    assert grids and all(torch.equal(ours.weights[n], theirs.weights[n]) for n in grids)


def test_a_site_aims_at_what_the_float_model_gives_it():
    """The last site, solved by hand: inputs of the quantized program, rounded, against the float ones."""
    act = Format("int4")
    config = GPTAQ(W3, act, lm_head=None)
    program, after, batches = programs("llama", config)
    last = find_sites(program)[-1]

    def values(of, node):
        rows = []
        for batch in batches:
            of.watch([node], batch, lambda n, v: rows.append(v.flatten(0, -2).double()))
        return torch.cat(rows)

    names = {n.name: n for n in after.graph.nodes}
    exact = values(program, last.input)
    read = torch.cat([as_rounded(x.float(), act).double() for x in values(after, names[last.input.name]).split(1)])
    even = exact.square().mean(-1, keepdim=True).rsqrt()  # every token counts alike
    exact, read = exact * even, read * even
    weight = program.weights[last.name]
    aim = towards_float(weight, read.t() @ read, exact.t() @ read, config.damp_percent)
    grid = quantize_tensor(aim, W3)
    assert not torch.allclose(quantize_tensor(weight, W3).scale, grid.scale, rtol=1e-3)
    assert torch.allclose(after.weights[f"{last.name}.scale"].float(), grid.scale.float(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "mixtral", "bert"])
def test_nearer_to_the_float_model_than_gptq(name):
    """On the calibration text itself, where the law speaks; both activations and weights are rounded."""

    def error(kind):
        model = build(name)
        config = kind(W3, Format("int4"), lm_head=None)
        report = qcompile.quantize(model, Recipe("r", (config, Fuse())), [example(name)] * 2, progress=False)
        with torch.no_grad():
            got, want = model(**example(name))[0], build(name)(**example(name))[0]
        return float((got - want).norm() / want.norm()), report

    (ours, report), (theirs, _) = error(GPTAQ), error(GPTQ)
    assert ours < theirs
    assert any("GPTQ" in note for p in report.passes for note in p.notes) == (name == "mixtral")


class Dead(torch.nn.Module):
    """Two sites with a ReLU between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_a_token_whose_float_input_is_nothing_decides_nothing():
    torch.manual_seed(0)
    model, x = Dead(), torch.randn(1, 200, 32)
    off = torch.linalg.solve(model.a.weight, -model.a.bias - 1e-3)  # every hidden unit just below zero
    program = capture(model, (x,))

    def scales(data):
        after = program.copy()
        rewrite(after, GPTAQ(W3, None, lm_head=None), batches=[(data,)])
        return [after.weights[n] for n in after.weights if n.endswith("b.weight.scale")]

    with_it = torch.cat([x, off.detach().expand(1, 1, 32)], 1)
    without = torch.cat([x, x[:, :1]], 1)
    (mine,), (plain,) = scales(with_it), scales(without)
    assert torch.allclose(mine, plain, rtol=0.2)


class Exact(nn.Module):
    """NaN wherever the first linear is not what it was."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32, bias=False), nn.Linear(32, 32), nn.Linear(32, 8)
        self.kept = nn.Parameter(self.a.weight.detach().clone())

    def forward(self, x):
        h = self.a(x)
        return self.c(self.b(torch.where((h - (x[..., None, :] * self.kept).sum(-1)).abs() < 1e-4, h, torch.nan)))


def test_nan_that_only_the_quantized_model_gives_is_named():
    with pytest.raises(CalibrationError, match=r"NaN or Inf.*b\.weight"):
        qcompile.quantize(Exact(), Recipe("r", (GPTAQ(W3, None), Fuse())), [torch.randn(1, 8, 32)], progress=False)


def test_bad_input():
    broken = torch.randn(1, 8, 32)
    broken[0, 3, 5] = torch.nan
    with pytest.raises(CalibrationError, match=r"batch 2 brings NaN or Inf to a\.weight \(node x\) in the float model"):
        qcompile.quantize(Dead(), Recipe("r", (GPTAQ(), Fuse())), [torch.randn(1, 8, 32), broken], progress=False)
    for strength in (1.5, -0.5):
        with pytest.raises(ValueError, match=rf"strength must be between 0 and 1, got {strength}"):
            GPTAQ(strength=strength)
    with pytest.raises(CalibrationError, match="empty"):
        qcompile.quantize(build("llama"), Recipe("r", (GPTAQ(), Fuse())), [], progress=False)
    recipe = Recipe("r", (GPTAQ(W3, None, strength=0.5), Fuse()))
    assert Recipe.from_json(recipe.to_json()) == recipe
