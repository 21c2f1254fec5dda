"""Where a scale for channels folds: through which operators, into which rows, and what stops it."""

from __future__ import annotations

import pytest
import torch
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
    assert not isinstance(source, Obstacle) and source.site.name == "up.weight", source


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


@pytest.mark.parametrize("name", ["llama", "bert", "phi3"])
def test_consumers_and_their_root(name):
    """Whoever reads the root through casts and layouts, and each site once."""
    program = capture(build(name), (), example(name))
    sites = [site for site in find_sites(program) if site.kind == "linear"]
    groups = groups_of_consumers(sites)
    assert sorted(s.name for g in groups for s in g.sites) == sorted(s.name for s in sites)
    assert all(find_consumers(g.root, sites) == g for g in groups)
