"""Rotate's law: streams and heads in other orthogonal bases, folded into the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import assert_rounded_once, before_and_after, rewrite, rewritten, shape
from torch import nn

from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.numerics.hadamard import random_orthogonal
from qcompile.passes import AWQ, FoldNorm, OnlineHadamard, Rotate, SmoothQuant, SmoothQuantPlus, Untie
from qcompile.passes.equivalent.rotate import conflicts, rotate_columns, rotate_rows
from qcompile.recipe.recipe import Recipe
from qcompile.testing import Decoder, assert_equivalent, decoders


@given(decoders())
@settings.get_profile("models")
def test_the_output_stays(model):
    before, after, ids, reports = before_and_after(model, Untie(), FoldNorm(), Rotate(seed=3), OnlineHadamard())
    assert_equivalent(before, after, [ids])
    streams = [d for d in reports[2].done if "stream" in d]
    assert bool(streams) == (not model.shape.post_norm), reports[2]
    heads = [d for d in reports[2].done if "heads" in d]
    assert len(heads) == model.shape.layers


def test_rotation_spreads_the_outlier():
    model = Decoder(shape(norm="rms", width=64))
    ids = model.example()
    with torch.no_grad():
        model.embedding.weight[:, 5] *= 100
    program = capture(model, (ids,)).widened()
    rewrite(program, FoldNorm(), batches=[[ids]])
    first = next(iter(observe(program, [[ids]]).absmax.values()))
    rewrite(program, Rotate(), batches=[[ids]])
    after = next(iter(observe(program, [[ids]]).absmax.values()))
    assert first.max() / first.median() > 10 > 4 > after.max() / after.median()


@given(st.integers(1, 4), st.sampled_from([2, 3, 5]), st.integers(0, 99))
def test_columns_and_rows_are_rotated_block_by_block(blocks, size, seed):
    """x R (W R)^T = x W^T, and (R^T W) makes x W^T R."""
    n, matrix = blocks * size, random_orthogonal(size, seed)
    whole = torch.block_diag(*[matrix] * blocks)
    x, weight = torch.randn(4, n, dtype=torch.float64), torch.randn(n, n, dtype=torch.float64)
    assert torch.allclose(rotate_columns(weight, matrix), weight @ whole)
    assert torch.allclose(x @ rotate_rows(weight, matrix).t(), x @ weight.t() @ whole)
    assert torch.allclose(rotate_rows(weight[:, 0], matrix), whole.t() @ weight[:, 0])


def test_scales_in_norm_gains_do_not_go_with_a_rotated_stream():
    for other, count in ((AWQ(), 1), (SmoothQuant(), 1), (SmoothQuantPlus(), 1), (SmoothQuant(norms=False), 0)):
        assert len(conflicts(Rotate(), [other])) == count
        assert not conflicts(Rotate(stream=False), [other])


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_stream_whose_norms_are_not_folded_is_skipped(norm):
    model = Decoder(shape(norm=norm))
    before, after, ids, (report,) = before_and_after(model, Rotate(heads=False))
    assert not report.done and report.skipped[0].node
    assert all(torch.equal(after.weights[name], weight) for name, weight in before.weights.items())


class TwoHalves(nn.Module):
    """Two streams that look up one table and add one vector: they are one basis."""

    def __init__(self):
        super().__init__()
        self.table, self.shift = nn.Embedding(11, 8), nn.Parameter(torch.randn(8))
        self.first, self.second, self.head, self.other = (nn.Linear(8, n) for n in (8, 8, 3, 3))
        self.norms = nn.ModuleList([nn.RMSNorm(8, elementwise_affine=False) for _ in range(2)])
        self.double().requires_grad_(False)

    def forward(self, ids):
        x, y = self.table(ids) + self.shift, self.table(10 - ids) + self.shift
        x, y = x + self.first(self.norms[0](x)), y + self.second(self.norms[1](y))
        return self.head(x) * self.other(y)


def test_a_table_of_two_streams_is_rotated_once():
    ids = torch.randint(11, (2, 4))
    before = capture(TwoHalves(), (ids,))
    after = before.copy()
    (report,) = rewrite(after, Rotate(heads=False), batches=[[ids]])
    assert_equivalent(before, after, [ids])
    assert len(report.done) == 1 and not report.skipped


class Positions(nn.Module):
    """A stream of tokens to which a learned position is added, as `place` does it."""

    def __init__(self, norm, place):
        super().__init__()
        self.tokens, self.positions, self.place = nn.Embedding(11, 8), nn.Embedding(9, 8), place
        self.table, self.narrow, self.widen = nn.Parameter(torch.randn(9, 8)), nn.Embedding(9, 4), nn.Linear(4, 8)
        self.register_buffer("waves", torch.randn(9, 8))
        self.norms = nn.ModuleList([norm(8) for _ in range(2)])
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 11)
        for gain in self.norms.parameters():
            nn.init.normal_(gain)

    def forward(self, ids):
        at = torch.arange(ids.shape[1])
        x = self.place(self, self.tokens(ids), ids, at)
        x = x + self.down(torch.relu(self.up(self.norms[0](x))))
        return self.head(self.norms[1](x))


POSITIONS = {
    "an embedding": (lambda m, x, ids, at: x + m.positions(at), {"positions.weight"}),
    "counted from a mask": (
        lambda m, x, ids, at: x + m.positions((ids >= 0).long().cumsum(1) + 1),
        {"positions.weight"},
    ),
    "a parameter": (lambda m, x, ids, at: x + m.table[: len(at)], {"table"}),
    "a buffer": (lambda m, x, ids, at: x + m.waves[: len(at)], {"waves"}),
    "beside scaled tokens": (lambda m, x, ids, at: x * 8**0.5 + m.positions(at), {"positions.weight"}),
    "from a smaller basis": (lambda m, x, ids, at: x + m.widen(m.narrow(at)), {"widen.weight", "widen.bias"}),
    "twice": (lambda m, x, ids, at: (x + m.positions(at)) + m.positions(at + 1), {"positions.weight"}),
}


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("place", POSITIONS)
def test_positions_are_in_the_basis_of_the_stream(norm, place):
    """Of a table that kept its basis, or its mean, the output would tell."""
    function, moved = POSITIONS[place]
    ids = torch.randint(11, (2, 7))
    before, after, (_, rotated) = rewritten(Positions(norm, function), FoldNorm(), Rotate(heads=False), x=ids)
    assert len(rotated.done) == 1 and not rotated.skipped
    producers = {"tokens.weight", "down.weight", "down.bias"} | moved
    tables = {"positions.weight", "table", "waves", "narrow.weight", "widen.weight", "widen.bias"}
    for name in (producers | tables) & set(before.weights):
        assert torch.equal(after.weights[name], before.weights[name]) == (name not in producers), name


@pytest.mark.parametrize("config", [SmoothQuant(), AWQ(), SmoothQuantPlus()])
@pytest.mark.parametrize("place", ["an embedding", "a parameter", "beside scaled tokens"])
def test_positions_keep_their_size_where_inputs_are_smoothed(config, place):
    """What scales move into is behind the sum: a table that took one would change what the other readers get."""
    before, after, _ = rewritten(Positions(nn.LayerNorm, POSITIONS[place][0]), config, x=torch.randint(11, (2, 7)))
    for name in {"tokens.weight", "positions.weight", "table"} & set(before.weights):
        assert torch.equal(after.weights[name], before.weights[name]), name


def test_a_position_that_is_read_as_a_weight_too_keeps_the_basis():
    """Scores of each token with all positions: the table is no longer the stream's alone."""

    def place(m, x, ids, at):
        x = x + m.positions(at)
        return x + torch.softmax(x @ m.positions.weight.t(), -1) @ m.positions.weight

    model, ids = Positions(nn.RMSNorm, place), torch.randint(11, (2, 7))
    before, after, reports = rewritten(model, FoldNorm(), Rotate(heads=False), x=ids)
    assert not reports[1].done and reports[1].skipped
    assert torch.equal(after.weights["positions.weight"], before.weights["positions.weight"])


def test_a_long_vector_is_rotated_whole():
    matrix = random_orthogonal(96, 0)
    vector = torch.randn(96 * 86, dtype=torch.float64)
    want = (vector.view(-1, 96) @ matrix).flatten()
    assert torch.allclose(rotate_columns(vector, matrix), want)


class Reuses(nn.Module):
    """A stream of two layers that are one, or whose table is the weight of a linear outside of the stream."""

    def __init__(self, function):
        super().__init__()
        self.table, self.head, self.function = nn.Embedding(11, 8), nn.Linear(8, 11), function
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.RMSNorm(8, elementwise_affine=False)
        self.outside = nn.Parameter(torch.randn(2, 4, 8))

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.first(self.norm(x))
        return self.function(self, x)


@pytest.mark.parametrize(
    "function,reason",
    [
        (lambda m, x: m.head(x + m.first(m.norm(x))), "is tied to"),
        (lambda m, x: m.head(x) + nn.functional.linear(m.outside.sin(), m.table.weight), "is a linear's weight too"),
        (
            lambda m, x: m.head(x) + nn.functional.linear(m.outside.sin(), m.second.weight, m.first.bias).sum(),
            "is tied",
        ),
        (lambda m, x: (m.head(x), x), "leaves the graph"),
        (lambda m, x: (m.head(x), m.head(m.outside.sin())), "is tied to"),
        (lambda m, x: (m.head(x + m.second(m.outside.sin())), m.second(m.outside.cos())), "is tied to"),
    ],
)
def test_a_stream_that_something_else_depends_on_keeps_its_basis(function, reason):
    *_, (report,) = rewritten(Reuses(function), Rotate(heads=False), x=torch.randint(11, (2, 4)))
    assert not report.done and any(reason in place.reason for place in report.skipped), report.skipped


def test_a_mean_that_is_not_folded_keeps_its_basis():
    model = Decoder(shape(norm="layer"))
    *_, (_, report) = rewritten(
        model, FoldNorm(center=False, open_streams=True), Rotate(heads=False), x=model.example()
    )
    assert not report.done and "subtracts a mean" in report.skipped[0].reason


class Heads(nn.Module):
    """Four heads of four channels and what reads their values; `split` gives [B, T, H, D] of a projection."""

    def __init__(self, function, split=lambda y: y.unflatten(-1, (4, 4))):
        super().__init__()
        self.qkv, self.out, self.other = (nn.Linear(16, n) for n in (48, 16, 16))
        self.narrow = nn.Linear(8, 16)
        self.function, self.split = function, split

    def forward(self, x):
        q, k, v = (self.split(y).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.function(self, y, x)


HEADS = {
    "joined": (lambda m, y, x: m.out(y.flatten(2)), True),
    "some of them": (lambda m, y, x: m.narrow(y[:, :, 1:3].flatten(2)), True),
    "read by two linears": (lambda m, y, x: m.out(z := y.flatten(2)) + m.other(z).sin(), False),
    "read by one that is used twice": (lambda m, y, x: m.out(y.flatten(2)) + m.out(x), False),
    "behind a ReLU": (lambda m, y, x: m.out(torch.relu(y.flatten(2))), False),
    "channels first": (lambda m, y, x: m.out(y.transpose(2, 3).flatten(2)), False),
    "halves of two heads": (lambda m, y, x: m.narrow(y.flatten(2)[..., 2:10]), False),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_rotated_where_they_are_whole(name):
    function, whole = HEADS[name]
    before, after, (report,) = rewritten(
        Heads(function), Rotate(stream=False), x=torch.randn(2, 3, 16, dtype=torch.float64)
    )
    assert bool(report.done) == whole
    rows, old = after.weights["qkv.weight"], before.weights["qkv.weight"]
    assert torch.equal(rows[:32], old[:32]) and torch.equal(rows[32:], old[32:]) != whole
    assert torch.equal(after.weights["qkv.bias"], before.weights["qkv.bias"]) != whole
    if name == "some of them":
        assert torch.equal(rows[:36], old[:36]) and torch.equal(rows[44:], old[44:])


def test_heads_that_were_split_into_strided_rows_are_joined_so():
    model = Heads(
        lambda m, y, x: m.out(y.transpose(2, 3).flatten(2)), lambda y: y.unflatten(-1, (4, 4)).transpose(2, 3)
    )
    *_, (report,) = rewritten(model, Rotate(stream=False), x=torch.randn(2, 3, 16, dtype=torch.float64))
    assert not report.done and "not whole blocks" in report.skipped[0].reason


def test_what_is_no_attention_has_no_heads():
    model = nn.Sequential(nn.Linear(8, 8), nn.Flatten(1), nn.Linear(8, 4))
    *_, (report,) = rewritten(model, Rotate(stream=False), x=torch.randn(3, 8, dtype=torch.float64))
    assert not report.done and not report.skipped


@pytest.mark.parametrize("config", [Rotate(heads=False), Rotate(stream=False)])
def test_weights_are_rounded_once(config):
    model = Decoder(shape())
    for name, gain in model.named_parameters():
        if "norm" in name:
            gain.fill_(1)
    assert_rounded_once(model, config)


def test_the_report_names_every_value_that_changes():
    model = Decoder(shape(norm="one_plus", layers=1))
    for name, gain in model.named_parameters():
        if "norm" in name:
            gain.zero_()
    *_, (report,) = rewritten(model, Rotate(), x=model.example())
    assert len(report.done) == 2


def test_a_rotation_of_streams_needs_folded_norms():
    with pytest.raises(ValueError, match="FoldNorm"):
        Recipe("alone", (Rotate(),)).check()
    Recipe("heads", (Rotate(stream=False),)).check()
