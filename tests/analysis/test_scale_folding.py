"""Where a scale for channels folds: through which operators, into which rows, and what stops it."""

from __future__ import annotations

import re

import pytest
import torch
from laws import FirstTokenLate
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from zoo import build, example

from qcompile.analysis.norms import find_norms
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.scale_folding import find_consumers, groups_of_consumers, scale_source
from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture


class Attention(nn.Module):
    """Four heads of four channels; heads are split and joined by the operators that are given."""

    def __init__(self, split, join):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.split, self.join = split, join

    def forward(self, x):
        q, k, v = (self.split(linear(x)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        return self.out(self.join(scaled_dot_product_attention(q, k, v).transpose(1, 2)))


def source_of(program, name):
    sites, norms = find_sites(program), find_norms(program)
    (group,) = [g for g in groups_of_consumers(sites) if any(site.name == name for site in g.sites)]
    return scale_source(program, group, norms, sites)


@pytest.mark.parametrize("split", [lambda y: y.view(*y.shape[:2], 4, 4), lambda y: y.unflatten(-1, (4, 4)),
                                   lambda y: y.reshape(y.shape[0], y.shape[1], 4, 4)])  # fmt: skip
@pytest.mark.parametrize("join", [lambda y: y.reshape(*y.shape[:2], 16), lambda y: y.flatten(2),
                                  lambda y: y.flatten(-2).unsqueeze(0).squeeze()])  # fmt: skip
def test_the_values_of_an_attention(split, join):
    model = Attention(split, join)
    program = capture(model, (torch.randn(2, 3, 16),), dynamic=False)
    source = source_of(program, "out.weight")
    assert not isinstance(source, Obstacle), source
    assert source.site.name == "value.weight" and source.attention and source.pure and source.head == 4
    assert source.channels.tolist() == list(range(16))


def test_channels_are_numbered_as_a_join_orders_them():
    """Heads behind channels: the map says which row each channel comes from."""
    model = Attention(lambda y: y.unflatten(-1, (4, 4)), lambda y: y.transpose(2, 3).flatten(2))
    source = source_of(capture(model, (torch.randn(2, 3, 16),)), "out.weight")
    assert source.channels.tolist() == torch.arange(16).view(4, 4).t().flatten().tolist()


def test_a_flatten_that_joins_tokens_repeats_the_rows():
    """[B, T, 4] -> [B, T 4]: channel c is row c mod 4, so one factor serves all tokens."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 4), nn.Linear(12, 5)

        def forward(self, x):
            return self.down(self.up(x).flatten(1))

    source = source_of(capture(Mixer(), (torch.randn(2, 3, 8),), dynamic=False), "down.weight")
    assert source.channels.tolist() == [0, 1, 2, 3] * 3


def test_tokens_that_become_channels_are_refused():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 4), nn.Linear(3, 5)

        def forward(self, x):
            return self.down(self.up(x).transpose(1, 2))

    source = source_of(capture(Mixer(), (torch.randn(2, 3, 8),), dynamic=False), "down.weight")
    assert isinstance(source, Obstacle) and "differ from row to row" in source.reason


def test_who_reads_only_the_shape_or_the_dtype_is_no_consumer():
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 5)
            self.register_buffer("mask", torch.arange(8))

        def forward(self, x):
            y = torch.relu(self.up(x))
            return self.down(y), self.mask.type_as(y), self.mask.to(y) * y.shape[0], y.new_zeros(3), torch.ones_like(y)

    program = capture(Typed(), (torch.randn(3, 8),))
    source = source_of(program, "down.weight")
    assert not isinstance(source, Obstacle) and source.site.name == "up.weight" and not source.pure, source


def test_gains_rows_and_what_carries_no_scale():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.gate, self.down = (
                nn.LayerNorm(8),
                nn.Linear(8, 6),
                nn.Linear(8, 6),
                nn.Linear(6, 8),
            )
            self.last = nn.Linear(8, 8)

        def forward(self, x):
            x = self.norm(x)
            return self.last(torch.sin(self.down(self.up(x) * torch.nn.functional.silu(self.gate(x)))))

    program = capture(Block(), (torch.randn(3, 8),))
    of_norm, of_rows, stopped = (source_of(program, f"{name}.weight") for name in ("up", "down", "last"))
    assert of_norm.norm.output.name == "layer_norm" and of_norm.site is None
    assert of_rows.site.name == "up.weight" and not of_rows.pure and not of_rows.attention
    assert stopped.node == "sin" and "does not carry a scale" in stopped.reason


class Heads(nn.Module):
    """One value, read by a linear whole and by another in pieces of four channels."""

    def __init__(self):
        super().__init__()
        self.norm, self.whole, self.pieces = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(4, 4)

    def forward(self, x):
        y = self.norm(x)
        return self.whole(y), self.pieces(y.view(*y.shape[:-1], 4, 4))


def test_pieces_of_the_channels_are_another_value():
    program = capture(Heads(), (torch.randn(2, 3, 16),))
    sites = find_sites(program)
    whole, pieces = groups_of_consumers(sites)
    assert [site.name for site in whole.sites] == ["whole.weight"] and whole.other_consumers
    assert [site.name for site in pieces.sites] == ["pieces.weight"]
    assert isinstance(source_of(program, "whole.weight"), Obstacle)


class Between(nn.Module):
    """A linear of eight rows, another of one, a product with eight columns, and what `function` does between them."""

    def __init__(self, function, columns=8):
        super().__init__()
        self.up, self.gate, self.down, self.function = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(columns, 5), function
        self.factor, self.heads, self.stack = (nn.Parameter(torch.randn(s)) for s in ((), (2, 1), (2, 8, 8)))

    def forward(self, x):
        out = self.function(self, x)
        first, *others = out if isinstance(out, tuple) else (out,)
        return self.down(first), others


def between(function, columns=8):
    return source_of(capture(Between(function, columns), (torch.randn(2, 3, 8),), dynamic=False), "down.weight")


ROWS = list(range(8))
FOLDS = {
    "straight": (lambda m, x: m.up(x), ROWS),
    "a cast": (lambda m, x: torch.relu(m.up(x).double()).float(), ROWS),
    "a gate for each token": (lambda m, x: m.gate(x) * m.up(x), ROWS),
    "a product with an input": (lambda m, x: x * m.up(x), ROWS),
    "a factor without dimensions": (lambda m, x: m.factor * m.up(x), ROWS),
    "halves of one linear": (lambda m, x: (lambda a, b: b * torch.sigmoid(a))(*m.up(x).chunk(2, -1)), [4, 5, 6, 7]),
    "halves by sizes": (lambda m, x: m.up(x).split([4, 4], -1)[0], [0, 1, 2, 3]),
    "pieces that others read": (lambda m, x: (lambda y: (y[..., :4], y[..., 4:].sin()))(m.up(x)), [0, 1, 2, 3]),
    "a split whose other half is read": (
        lambda m, x: (lambda y: (y[..., :4], y.chunk(2, -1)[1].sin()))(m.up(x)), [0, 1, 2, 3]
    ),
    "copies weighed": (lambda m, x: (m.up(x).unsqueeze(-2) * m.heads.abs()).flatten(-2), [*ROWS, *ROWS]),
    "a value whose dtype is read": (
        lambda m, x: (lambda y: (torch.relu(y), torch.ones(2, dtype=torch.long).type_as(y)))(m.up(x)), ROWS
    ),
    "tokens in one row": (lambda m, x: m.up(x).view(2, 24), ROWS * 3),
    "values of a product": (lambda m, x: torch.softmax(x @ x.mT, -1) @ m.up(x), ROWS),
    "values for all heads": (
        lambda m, x: (torch.softmax(x.view(2, 3, 2, 4).transpose(1, 2) @ x.view(2, 3, 2, 4).permute(0, 2, 3, 1), -1)
                      @ m.up(x).unsqueeze(1)).transpose(1, 2).flatten(2), [*ROWS, *ROWS]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_what_a_positive_factor_passes(name):
    function, rows = FOLDS[name]
    source = between(function, len(rows))
    assert not isinstance(source, Obstacle), source
    assert source.site.name == "up.weight" and source.channels.tolist() == rows
    assert source.attention == ("values" in name)


STOPS = {
    "an output": (lambda m, x: (lambda y: (torch.relu(y), y))(m.up(x)), "read on another path"),
    "another function": (lambda m, x: (lambda y: (torch.relu(y), y.sin()))(m.up(x)), "read on another path"),
    "a function of all beside a half": (lambda m, x: (lambda y: (y[..., 4:], y.sin()))(m.up(x)), "on another path"),
    "a view that is read": (lambda m, x: (lambda y: (torch.relu(y), y.flatten(1).sin()))(m.up(x)), "on another path"),
    "its own gate": (lambda m, x: (lambda y: y * torch.sigmoid(y))(m.up(x)), "read on another path"),
    "a square": (lambda m, x: (lambda y: y * y)(torch.relu(m.up(x))), "read on another path"),
    "queries and keys, too": (
        lambda m, x: (lambda y: scaled_dot_product_attention(y, y, y))(m.up(x)), "read on another path"
    ),
    "the same half twice": (
        lambda m, x: (lambda y: (torch.relu(y.chunk(2, -1)[0]), y.chunk(2, -1)[0].sin()))(m.up(x)), "on another path"
    ),
    "integers": (lambda m, x: torch.relu(m.up(x)).long().float(), "does not carry a scale"),
    "booleans": (lambda m, x: (m.up(x) > 0).float(), "does not carry a scale"),
    "an activation": (lambda m, x: torch.tanh(m.up(x)), "does not carry a scale"),
    "a sum": (lambda m, x: m.up(x) + 1.0, "does not carry a scale"),
    "experts": (lambda m, x: torch.relu(x.expand(2, 3, 8) @ m.stack), "does not carry a scale"),
    "one weight used twice": (lambda m, x: torch.relu(m.up(torch.relu(m.up(x)))), "is shared with"),
    "no linear at all": (lambda m, x: x * 2, "does not carry a scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_what_a_factor_does_not_pass_is_named(name):
    function, reason = STOPS[name]
    source = between(function, 4 if "half" in name else 8)
    assert isinstance(source, Obstacle) and re.search(reason, source.reason), source


def test_an_attention_over_channels_has_no_map():
    """[B, D, T] as values: each position is another row."""
    source = between(lambda m, x: torch.softmax(x.mT @ x, -1) @ m.up(x).mT, 3)
    assert isinstance(source, Obstacle) and "differ from token to token" in source.reason


def test_grouped_heads_repeat_head_by_head():
    class Grouped(Attention):
        def forward(self, x):
            q, k, v = (f(x).view(2, 3, -1, 4).transpose(1, 2) for f in (self.query, self.key, self.value))
            return self.out(scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    model = Grouped(None, None)
    model.key, model.value = nn.Linear(16, 8), nn.Linear(16, 8)
    source = source_of(capture(model, (torch.randn(2, 3, 16),), dynamic=False), "out.weight")
    assert source.channels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7] and source.head == 4


def heads_of(split, join):
    model = Attention(split, join)
    columns = join(torch.zeros(2, 3, 4, 4)).shape[-1]
    model.out = nn.Linear(columns, 16)
    source = source_of(capture(model, (torch.randn(2, 3, 16),), dynamic=False), "out.weight")
    return source.channels.tolist(), source.head


def test_heads_are_whole_where_each_is_a_run_of_rows():
    def whole(y):
        return y.unflatten(-1, (4, 4))

    def strided(y):
        return whole(y).transpose(2, 3)

    assert heads_of(whole, lambda y: y.flatten(2)) == (list(range(16)), 4)
    assert heads_of(whole, lambda y: y[:, :, 1:3].flatten(2)) == (list(range(4, 12)), 4)
    assert heads_of(strided, lambda y: y.transpose(2, 3).flatten(2)) == (
        list(range(16)),
        0,
    )  # joined as they were split
    assert heads_of(whole, lambda y: y.transpose(2, 3).flatten(2))[1] == 0
    assert heads_of(whole, lambda y: y.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(2))[1] == 0  # pairs apart
    assert heads_of(whole, lambda y: y.flatten(2)[..., 2:10]) == (list(range(2, 10)), 0)  # runs, of two heads each
    assert heads_of(whole, lambda y: y.flatten(2)[..., :6]) == (list(range(6)), 0)

    def again(y):  # another attention, of other heads
        y = y.flatten(2).view(2, 3, 2, 8).transpose(1, 2)
        return (torch.softmax(torch.ones(2, 2, 3, 3), -1) @ y).transpose(1, 2).flatten(2)

    assert heads_of(whole, again) == (list(range(16)), 0)


class Normed(nn.Module):
    """Two norms and what reads them."""

    def __init__(self, function, shared=()):
        super().__init__()
        self.norm, self.other, self.function = nn.LayerNorm(8), nn.LayerNorm(8), function
        for name in shared:
            setattr(self.other, name, getattr(self.norm, name))
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.stack, self.rows = nn.Parameter(torch.randn(2, 8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.function(self, x)


def groups_in(model):
    program = capture(model, (torch.randn(2, 8, 8),), dynamic=False)
    sites, norms = find_sites(program), find_norms(program)
    groups = groups_of_consumers(sites)
    return {tuple(s.name[0] for s in g.sites): scale_source(program, g, norms, sites) for g in groups}


def test_casts_and_layouts_of_other_dimensions_read_the_same_channels():
    def function(m, x):
        y = m.norm(x)
        return m.a(y.double().float()), m.b(y.flatten(0, 1)), m.c(y)

    ((names, source),) = groups_in(Normed(function)).items()
    assert sorted(names) == ["a", "b", "c"] and source.norm is not None


def test_what_reads_a_norm_and_absorbs_no_factor_is_another_consumer():
    for other in (
        lambda m, y: y @ m.stack,  # experts, whose columns no pass scales
        lambda m, y: y.sin(),
        lambda m, y: y,
        lambda m, y: y.sum((0, 1))[3],
        lambda m, y: m.b(m.rows[y[..., 0].long()]),
        lambda m, y: m.b(m.rows[y.long()]),  # channels that pick rows
        lambda m, y: m.b(y.long().float()),
    ):
        found = groups_in(Normed(lambda m, x, other=other: (lambda y: (m.a(y), other(m, y)))(m.norm(x))))
        assert isinstance(found["a",], Obstacle) and "not a site too" in found["a",].reason
        assert {name for names in found for name in names} <= {"a", "b"}
    assert groups_in(Normed(lambda m, x: m.norm(x) @ m.stack)) == {}


def test_a_gain_or_a_shift_of_two_norms_takes_no_factor():
    def function(m, x):
        return m.a(m.norm(x)), m.other(x).sin()

    assert groups_in(Normed(function))["a",].norm is not None
    for shared in (["weight"], ["bias"]):
        assert "another norm uses" in groups_in(Normed(function, shared))["a",].reason
    model = Normed(function)
    model.norm = nn.LayerNorm(8, elementwise_affine=False)
    assert groups_in(model)["a",].reason == "a norm without a gain"


def test_a_gain_whose_channels_are_reordered_takes_no_factor():
    def function(m, x):
        return m.a(m.norm(x).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2))

    assert "reshaped before the site" in groups_in(Normed(function))["a",].reason


def test_weights_and_scalars_as_inputs_belong_to_one_group_each():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.w, self.v, self.s = (nn.Parameter(torch.randn(s)) for s in ((8, 8), (4, 8), (4, 8), ()))

        def forward(self, x):
            linear = nn.functional.linear
            return linear(self.p, self.w), linear(x, self.p), linear(self.s.expand(3, 8), self.v)

    program = capture(Weights(), (torch.randn(3, 8),), dynamic=False)
    groups = groups_of_consumers(find_sites(program))
    assert sorted(site.name for group in groups for site in group.sites) == ["p", "v", "w"]


def test_consumers_are_in_graph_order_however_their_input_is_cut():
    program = capture(FirstTokenLate(), (torch.randn(4, 2, 32),), dynamic=False)
    groups = groups_of_consumers(find_sites(program))
    assert [[site.name[0] for site in group.sites] for group in groups] == [["b", "a"], ["c"]]


@pytest.mark.parametrize("name", ["llama", "bert", "phi3"])
def test_consumers_and_their_root(name):
    """Whoever reads the root through casts and layouts, and each site once."""
    program = capture(build(name), (), example(name))
    sites = [site for site in find_sites(program) if site.kind == "linear"]
    groups = groups_of_consumers(sites)
    assert sorted(s.name for g in groups for s in g.sites) == sorted(s.name for s in sites)
    assert all(find_consumers(g.root, sites) == g for g in groups)
