"""The values that share a basis: operators that commute with a rotation, and those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build, example

from qcompile.analysis.obstacle import ObstacleKind
from qcompile.analysis.residual_stream import keeps_last, residual_streams
from qcompile.ir.capture import capture


class Stream(nn.Module):
    """Two layers of a stream of eight channels, with an operator between them."""

    def __init__(self, between):
        super().__init__()
        self.table, self.between = nn.Embedding(11, 8), between
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norms = nn.ModuleList([nn.RMSNorm(8, elementwise_affine=False) for _ in range(2)])
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        x = self.table(ids)
        x = self.between(x + self.first(self.norms[0](x)))
        return self.head(x + self.second(self.norms[1](x)))


def streams_of(between, shape=(2, 4)):
    return residual_streams(capture(Stream(between), (torch.randint(11, shape),), dynamic=False))


COMMUTE = {
    "view": lambda x: x.view(-1, 8),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(),
    "expand": lambda x: x.unsqueeze(1).expand(2, 3, 4, 8),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "slice": lambda x: x[:, 1:],
    "select": lambda x: x[:, -1],
    "index": lambda x: x[:, torch.tensor([2, 0])],
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "sum over tokens": lambda x: x.sum(1),
    "cast": lambda x: x.double().float(),
    "cast to a device": lambda x: x.to(x.device, torch.float64).float(),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "cat in front": lambda x: torch.cat([x, x]),
    "stack in front": lambda x: torch.stack([x, x]),
    "a transpose by negative axes": lambda x: x.transpose(-3, -2),
    "a sum with a factor": lambda x: torch.add(x, x * 2, alpha=3),
    "a difference": lambda x: x - 0.5 * x,
    "a scalar on the left": lambda x: torch.tensor(2.0) * x,
    "what reads the dtype alone": lambda x: x * torch.arange(4).view(4, 1).type_as(x) * x.new_ones(1),
    "what has the shape alone": lambda x: x * torch.full_like(x, 2.0)[:1, :1, :1],
    "a scalar": lambda x: 0.5 * x / 3,
    "a factor for each token": lambda x: x * torch.arange(4.0).view(4, 1),
}
MIX = {
    "t": lambda x: x.t(),
    "transpose": lambda x: x.transpose(0, 1),
    "transpose back": lambda x: x.transpose(1, 0),
    "permute": lambda x: x.permute(1, 0),
    "mT": lambda x: x.mT,
    "numpy_T": lambda x: torch.ops.aten.numpy_T(x),
    "index": lambda x: x[torch.arange(8), torch.arange(8).flip(0)].expand(8, 8),
    "a slice of the channels": lambda x: x[:, :4].repeat(1, 2),
    "repeat_interleave": lambda x: x[:, ::2].repeat_interleave(2, 1),
    "all repeated": lambda x: x[:2, :4].repeat_interleave(8).view(8, 8),
    "sum over channels": lambda x: x.sum(1).expand(8, 8),
    "sum over channels, negative": lambda x: x.sum(-1).expand(8, 8),
    "sum over tokens and channels": lambda x: x.expand(8, 8, 8).sum((0, 2)).expand(8, 8),
    "a row of channels": lambda x: x[:, 0].expand(8, 8),
    "one channel": lambda x: x + x.sum(0)[3],
    "a sum of all": lambda x: x + x.sum(),
    "channels by index": lambda x: x.index_select(1, torch.arange(8).flip(0)),
    "channels that pick rows": lambda x: x + torch.eye(8)[x[0].long() * 0],
    "rounding": lambda x: x.long().float(),
    "copies behind the channels": lambda x: torch.stack([x] * 8, -1).sum(1),
    "a sum with a scalar": lambda x: x + 1.0,
    "a sum with one value for each token": lambda x: x - torch.arange(8.0).view(8, 1),
    "a square": lambda x: x * x,
    "a product of two": lambda x: x * (x + x),
    "a divisor": lambda x: torch.arange(8.0).view(8, 1) / x,
    "a maximum": lambda x: torch.maximum(x, x * 2),
    "a factor for each channel": lambda x: x * torch.arange(8.0),
    "a reshape of other rows": lambda x: x.reshape(4, 16).t().reshape(8, 8),
    "an activation": torch.relu,
}


@pytest.mark.parametrize("name", COMMUTE)
def test_what_commutes_with_a_rotation(name):
    (stream,) = streams_of(COMMUTE[name])
    assert stream.closed, stream.obstacles
    assert [site.name for site in stream.producers] == ["first.weight", "second.weight"]
    assert [site.name for site in stream.consumers] == ["first.weight", "second.weight", "head.weight"]
    assert len(stream.tables) == 1 and len(stream.norms) == 2
    assert stream.label == "stream of 8 at embedding" and str(stream.norms[0].output) == "rms_norm"


@pytest.mark.parametrize("name", MIX)
def test_what_mixes_channels_opens_the_stream(name):
    """Rows and channels are eight both: no size tells them apart."""
    streams = streams_of(MIX[name], (8,))
    assert all(not stream.closed and len(set(stream.obstacles)) == len(stream.obstacles) for stream in streams)


class Ends(Stream):
    """What else may read a stream, or write to it."""

    def __init__(self, function, computed=False):
        super().__init__(lambda x: x)
        self.function, self.computed = function, computed
        self.stack, self.shift = nn.Parameter(torch.randn(2, 8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, ids):
        x = nn.functional.embedding(ids, self.table.weight * 2) if self.computed else self.table(ids)
        x = x + self.first(self.norms[0](x))
        out = self.head(x + self.second(self.norms[1](x)))
        return self.function(self, x, out)


OPENS = {
    "an output": (lambda m, x, out: (out, x), "leaves the graph as an output"),
    "experts that read it": (lambda m, x, out: (out, x @ m.stack), "feeds a stack of expert weights"),
    "experts that write to it": (lambda m, x, out: (out, m.norms[0](x @ m.stack)), "does not commute"),
    "a vector that is a bias too": (
        lambda m, x, out: (out, m.head(x + m.shift), nn.functional.linear(m.norms[0](x), m.second.weight, m.shift)),
        "linear does not commute",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENS)
def test_what_reads_or_writes_a_stream_otherwise_opens_it(name):
    function, reason = OPENS[name]
    streams = residual_streams(capture(Ends(function), (torch.randint(11, (2, 4)),), dynamic=False))
    obstacles = [str(o) for stream in streams for o in stream.obstacles]
    assert any(reason in obstacle for obstacle in obstacles), obstacles


def test_a_stream_that_no_linear_reads_is_open():
    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8)

        def forward(self, ids):
            return torch.ones_like(self.norm(self.table(ids)))

    (stream,) = residual_streams(capture(Shapes(), (torch.randint(11, (2, 4)),)))
    assert not stream.closed and "no linear reads" in stream.obstacle.reason


def test_gains_are_obstacles_of_their_own_kind():
    model = Stream(lambda x: x)
    model.norms = nn.ModuleList([nn.RMSNorm(8) for _ in range(2)])
    with torch.no_grad():
        model.norms[0].weight.mul_(2)
    (stream,) = residual_streams(capture(model, (torch.randint(11, (2, 4)),)))
    assert [o.kind for o in stream.obstacles] == [ObstacleKind.GAIN] and not stream.closed
    (stream,) = streams_of(torch.relu)[:1]
    assert {o.kind for o in stream.obstacles} == {ObstacleKind.FLOW}


def test_streams_do_not_overlap():
    for name in ("llama", "bert", "whisper_encoder"):
        streams = residual_streams(capture(build(name), (), example(name), dynamic=name != "whisper_encoder"))
        values = [value for stream in streams for value in stream.values]
        assert len(values) == len(set(values)) and all(stream.norms for stream in streams)


def test_heads_do_not_keep_the_last_dimension():
    program = capture(Stream(lambda x: x.unflatten(-1, (2, 4)).flatten(-2)), (torch.randint(11, (2, 4)),))
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.unflatten.int)
    assert not keeps_last(node, 8) and not keeps_last(next(iter(node.users)), 8)


class TwoHalves(nn.Module):
    """An encoder and a decoder that look up one table, or a learned table that both add."""

    def __init__(self, one_table, one_vector):
        super().__init__()
        self.other = nn.Embedding(11, 8) if not one_table else None
        self.one_vector = one_vector
        self.table, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(4, 8))
        self.encoder, self.decoder = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norms = nn.ModuleList([nn.RMSNorm(8, elementwise_affine=False) for _ in range(2)])
        self.cross, self.head = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, ids, others):
        x, y = self.table(ids), (self.other or self.table)(others)
        x, y = (x + self.positions, y + self.positions) if self.one_vector else (x, y)
        for _ in range(2):
            x, y = x + self.encoder(self.norms[0](x)), y + self.decoder(self.norms[1](y))
        return self.head(y).mean(1) + self.cross(x).mean(1)


@pytest.mark.parametrize("one_table,one_vector", [(True, True), (True, False), (False, True)])
def test_what_reads_one_table_is_one_stream(one_table, one_vector):
    program = capture(
        TwoHalves(one_table, one_vector).requires_grad_(False), (torch.randint(11, (2, 4)), torch.randint(11, (2, 4)))
    )
    (stream,) = residual_streams(program)
    assert stream.closed and len(stream.tables) == 1 + (not one_table) + one_vector
    order = list(program.graph.nodes)
    assert len(stream.norms) == 4 and stream.norms == sorted(stream.norms, key=lambda norm: order.index(norm.output))
    assert {site.name for site in stream.consumers} == {
        "encoder.weight", "decoder.weight", "cross.weight", "head.weight",
    }  # fmt: skip


def test_a_norm_of_what_comes_in_belongs_to_its_stream():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    (stream,) = residual_streams(capture(model, (torch.randn(3, 8),)))
    assert len(stream.norms) == 1 and "comes in from outside" in str(stream.flow_obstacle)
    assert stream.label.startswith("stream of 8 at ")
