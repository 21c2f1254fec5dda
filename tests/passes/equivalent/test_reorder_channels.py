"""ReorderChannels' law: channels in falling order of their absmax, folded into everyone who writes and reads them."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from laws import before_and_after, rewritten
from torch import nn

from qcompile.analysis.channel_origin import FlowStops
from qcompile.analysis.scale_folding import groups_of_consumers
from qcompile.analysis.sites import find_sites
from qcompile.calibration.statistics import observe
from qcompile.passes import FoldNorm, ReorderChannels, Untie
from qcompile.passes.equivalent.reorder_channels import common_order
from qcompile.recipe.recipe import Recipe
from qcompile.testing import assert_equivalent, decoders


@given(decoders())
@settings.get_profile("models")
def test_the_output_stays_and_channels_fall(model):
    before, after, ids, (_, _, report) = before_and_after(model, Untie(), FoldNorm(), ReorderChannels(stream=True))
    assert_equivalent(before, after, [ids])
    assert_equivalent(before, after, [model.example(3, 9)])
    rows = [d for d in report.done if "stream" not in d]
    assert len(rows) == 2 * model.shape.layers, report  # after attention and after the gate or the ReLU
    assert any("stream" in d for d in report.done) == (not model.shape.post_norm), report
    head, peaks = model.shape.head, observe(after, [[ids]]).absmax
    by_site = {g.sites[0].name: peaks[g.root.name] for g in groups_of_consumers(find_sites(after)) if g.sites}
    down = by_site["blocks.0.down.weight"]
    assert bool((down[:-1] >= down[1:] - 1e-9).all())
    shared = by_site["blocks.0.out.weight"].view(model.shape.kv_heads, -1, head).amax(1)
    assert bool((shared[:, :-1] >= shared[:, 1:] - 1e-9).all())


def test_heads_that_share_rows_share_their_order():
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])  # two query heads read value head 0
    absmax = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 4.0, 1.0, 2.0, 3.0])
    assert common_order([rows], absmax, 3).tolist() == [0, 1, 2, 3, 4, 5, 8, 7, 6]  # peaks 9, 5, 4: stays; reversed


def test_rows_without_a_common_order_are_refused():
    with pytest.raises(FlowStops, match="no common order"):
        common_order([torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 3, 2])], torch.rand(4), 2)
    with pytest.raises(FlowStops, match="no common order"):
        common_order([torch.tensor([0, 0, 1, 1])], torch.rand(4), 0)


class Gate(nn.Module):
    """Two linears of eight rows and one that reads what `function` makes of them."""

    def __init__(self, function, rows=8, columns=8):
        super().__init__()
        self.a, self.b, self.down, self.function = (
            nn.Linear(8, rows),
            nn.Linear(8, rows),
            nn.Linear(columns, 5),
            function,
        )
        self.heads, self.stack = nn.Parameter(torch.randn(2, 1)), nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        out = self.function(self, x)
        first, *others = out if isinstance(out, tuple) else (out,)
        return self.down(first), others


ORDERED = {
    "a gate": lambda m, x: torch.sigmoid(m.a(x)) * m.b(x),
    "a squared ReLU": lambda m, x: torch.relu(m.a(x)) ** 2,
    "a value that is cast to be read": lambda m, x: torch.tanh(m.a(x)).float().double(),
    "a value that is read by rows": lambda m, x: torch.tanh(m.a(x)).flatten(0, 1),
    "a factor for each token": lambda m, x: m.a(x) * x[..., :1],
    "integers": lambda m, x: (m.a(x) * 9).long().double(),
}
KEPT = {
    "one linear twice": (lambda m, x: torch.relu(m.a(x)) * m.a(x.flip(0)), "tied|no common order"),
    "a factor for each half": (lambda m, x: (m.a(x).unflatten(-1, (2, 4)) * m.heads).flatten(-2), "factor for each"),
    "a linear that reads it and something else": (lambda m, x: (torch.tanh(m.a(x)), m.down(x)), "is tied"),
    "another reader": (lambda m, x: (y := torch.tanh(m.a(x)), y.sin()), "not a site too"),
    "another reader on the way": (lambda m, x: (torch.tanh(y := m.a(x)), y.sin()), "read on another path"),
    "other tokens of it": (lambda m, x: (lambda y, z: (y, z.sin()))(*torch.tanh(m.a(x)).chunk(2, 1)), "another path"),
    "a tied bias": (lambda m, x: torch.tanh(m.a(x)) + 0 * torch.tanh(m.b(x)), "elementwise|tied"),
    "a softmax": (lambda m, x: torch.softmax(m.a(x), -1), "not elementwise"),
    "halves in two orders": (
        lambda m, x: m.a(x) * torch.cat([m.b(x)[..., 4:], m.b(x)[..., :4].flip(-1)], -1), "no common order|elementwise"
    ),
    "a sum that is padded": (lambda m, x: torch.cat([(m.a(x) + m.b(x))[..., :7], m.a(x)[..., 7:]], -1), "no common"),
}  # fmt: skip
X = torch.randn(2, 4, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", ORDERED)
def test_what_is_the_same_function_of_every_row_is_sorted(name):
    before, after, (report,) = rewritten(Gate(ORDERED[name]), ReorderChannels(), x=X)
    assert report.done == ["down.weight"]
    assert not torch.equal(after.weights["a.weight"], before.weights["a.weight"])
    assert sorted(after.weights["a.bias"].tolist()) == sorted(before.weights["a.bias"].tolist())


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_its_order_is_named(name):
    function, reason = KEPT[name]
    model = Gate(function)
    if name == "a tied bias":
        model.b.bias = model.a.bias
        model.function = lambda m, x: torch.tanh(m.a(x)) * torch.tanh(m.b(x))
    before, after, (report,) = rewritten(model, ReorderChannels(), x=X)
    assert not report.done and any(re.search(reason, place.reason) for place in report.skipped), report.skipped
    assert all(after.weights[name] is tensor for name, tensor in before.weights.items())


class Heads(nn.Module):
    """Heads that are split and joined by the operators that are given."""

    def __init__(self, split, join, attend):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.split, self.join, self.attend = split, join, attend

    def forward(self, x):
        q, k, v = (self.split(f(x)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(self.join(self.attend(q, k, v).transpose(1, 2)))


def whole(y):
    return y.unflatten(-1, (4, 4))


def strided(y):
    return whole(y).transpose(2, 3)


@pytest.mark.parametrize(
    "attend", [nn.functional.scaled_dot_product_attention, lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v]
)
@pytest.mark.parametrize("split,join,sorts", [(whole, lambda y: y.flatten(2), True),
                                              (strided, lambda y: y.transpose(2, 3).flatten(2), False)])  # fmt: skip
def test_no_row_leaves_its_head(split, join, sorts, attend):
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    *_, (report,) = rewritten(Heads(split, join, attend), ReorderChannels(), x=x)
    assert report.done == (["out.weight"] if sorts else [])
    assert sorts or "from one head of an attention to another" in report.skipped[-1].reason


class Stream(nn.Module):
    """Two layers of a stream; the channels of the norms' values have other peaks than any other value's."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8, elementwise_affine=False)
        self.first, self.up, self.second, self.head = (nn.Linear(8, n) for n in (8, 8, 8, 5))

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.first(self.norm(x))
        return self.head(self.norm(x + self.second(torch.tanh(self.up(self.norm(x))) * 9.0)))


def test_a_stream_is_sorted_by_the_largest_of_what_its_linears_read():
    ids = torch.randint(11, (2, 4))
    before, after, (report,) = rewritten(Stream(), ReorderChannels(stream=True, rows=False), x=ids)
    assert len(report.done) == 1 and not report.skipped
    program = observe(after, [[ids]]).absmax
    groups = [g for g in groups_of_consumers(find_sites(after)) if g.sites[0].name != "second.weight"]
    peaks = torch.stack([program[g.root.name] for g in groups]).amax(0)
    assert len(groups) == 3 and bool((peaks[:-1] >= peaks[1:]).all())
    *_, (report,) = rewritten(Stream(), ReorderChannels(), x=ids)
    assert report.done == ["second.weight"] and not report.skipped


def test_streams_need_folded_norms():
    with pytest.raises(ValueError, match="FoldNorm"):
        Recipe("alone", (ReorderChannels(stream=True),)).check()
    Recipe("rows", (ReorderChannels(),)).check()


def test_heads_that_share_rows_of_the_second_linear_only():
    absmax = torch.tensor([1.0, 2.0, 2.0, 1.0])
    with pytest.raises(FlowStops, match="no common order"):
        common_order([torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 4, 5])], absmax, 2)
    assert common_order([torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 4, 5])], absmax[[1, 0, 1, 0]], 2).tolist()
    assert common_order([torch.tensor([0, 1, 0, 1])], absmax, 2).tolist() == [0, 1, 2, 3]
    assert common_order([torch.tensor([0, 1, 2, 3])], absmax, 2).tolist() == [1, 0, 2, 3]
