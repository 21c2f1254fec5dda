"""Stacks of layers, as graphs that are cut into blocks."""

from __future__ import annotations

import torch
from torch import nn

import qcompile
from qcompile.backend.blocked_graph import cut_graph


class Layer(nn.Module):
    """A layer of a decoder without attention: x + f(norm(x) * shared)."""

    def __init__(self, wide: int = 12, constant: float = 1.0, pairs: bool = False, early: bool = False):
        super().__init__()
        self.up, self.down, self.constant = nn.Linear(8, wide), nn.Linear(wide // 2, 8, bias=False), constant
        self.pairs, self.early = pairs, early

    def forward(self, x, shared, first):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * shared
        gate, up = self.up(normed).chunk(2, -1)
        y = self.down(torch.sigmoid(gate * self.constant) * up)
        y = torch.cat(list(y.split(4, -1))[::-1], -1) if self.pairs else y
        return (first if self.early else x) + y, y


class Stack(nn.Module):
    """Layers between a first and a last product; `gives` layers give a value inside of them to the caller too."""

    def __init__(self, layers, gives=(), ragged=True):
        super().__init__()
        self.layers, self.gives, self.ragged = nn.ModuleList(layers), gives, ragged
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x, scale):
        shared, extra = torch.cos(scale) + 2, []
        x = first = torch.relu(self.first(x)) if self.ragged else x
        for index, layer in enumerate(self.layers):
            x, inner = layer(x, shared, first)
            if index in self.gives:
                extra.append(inner * 2)
        return self.last(x) if self.ragged else x, *extra


def captured(stack, rows=3):
    torch.manual_seed(1)
    return qcompile.capture(stack.eval(), (torch.randn(rows, 8), torch.randn(8)))


def cut(program, **options):
    return cut_graph(program.graph_module, **{"least_saved": 1, **options})


def run_parts(program, blocked, *inputs):
    return blocked.run([lambda given, g=graph: g(*given) for graph in blocked.graphs], program.bind(inputs))


def calls(blocked):
    """How often each graph is called."""
    return sorted([call.graph for call in blocked.calls].count(i) for i in range(len(blocked.graphs)))


def check(program, blocked):
    for rows in (3, 1, 7):
        inputs = torch.randn(rows, 8), torch.randn(8)
        for want, got in zip(program(*inputs), run_parts(program, blocked, *inputs), strict=True):
            assert torch.equal(want, got)
