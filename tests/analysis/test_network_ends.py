"""The first and the last products of a network, by dataflow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qcompile.analysis.conv_sites import find_conv_sites
from qcompile.analysis.network_ends import is_first, is_last
from qcompile.analysis.sites import find_sites
from qcompile.ir.aten_ops import LINEAR
from qcompile.ir.capture import capture


def ends(model, *inputs):
    """Names of the first and of the last products."""
    program = capture(model.eval(), inputs)
    sites = [*find_sites(program), *find_conv_sites(program)]
    return {s.name for s in sites if is_first(s.node)}, {s.name for s in sites if is_last(s.node)}


class Branches(nn.Module):
    """Two convolutions read the image, two linears give outputs, one of them through the other branch too."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.middle, self.one, self.two = nn.Conv2d(4, 4, 1), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        y = F.relu(self.left(x / 255)) + self.right(x)
        features = self.middle(F.max_pool2d(y, 2)).mean((2, 3))
        return self.one(features).softmax(-1), self.two(features)


def test_branches():
    first, last = ends(Branches(), torch.randn(2, 1, 8, 8))
    assert first == {"left.weight", "right.weight"}
    assert last == {"one.weight", "two.weight"}


class Tokens(nn.Module):
    """A table, two linears and logits; the first linear's input comes from a product, the look-up."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, ids):
        return self.head(torch.relu(self.inner(self.table(ids))))


def test_a_table_is_the_first_product():
    first, last = ends(Tokens(), torch.zeros(2, 3, dtype=torch.long))
    assert first == set() and last == {"head.weight"}


def test_a_product_whose_result_also_leaves_the_graph_is_not_the_last():
    class Both(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return y, self[1](y)

    assert ends(Both(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)) == ({"0.weight"}, {"1.weight"})


def test_a_product_that_nobody_reads_gives_no_output():
    program = capture(nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 4),))
    (product,) = program.graph.find_nodes(op="call_function", target=LINEAR)
    unread = program.insert(LINEAR, product.args, after=product)
    assert is_last(product) and not is_last(unread)
