"""Untie: a weight of its own for each site that shares one with a table, and none where sites share it."""

from __future__ import annotations

import torch
from laws import before_and_after, rewrite, rewritten, shape
from torch import nn

from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture
from qcompile.passes import FoldNorm, Rotate, Untie
from qcompile.testing import Decoder, assert_equivalent


def test_tied_weights_are_refused_until_untied():
    model = Decoder(shape(tied=True))
    *_, reports = before_and_after(model, FoldNorm(), Rotate())
    assert any("Fix: Untie()" in place.reason for place in reports[0].skipped)
    *_, reports = before_and_after(model, Untie(), FoldNorm(), Rotate())
    assert not reports[1].skipped and any("stream" in d for d in reports[2].done)


def test_a_tied_site_gets_a_copy_under_its_other_name():
    before, after, ids, (report,) = before_and_after(Decoder(shape(tied=True)), Untie())
    ((new, old),) = report.renamed.items()
    assert report.done == [f"{new} from {old}"] and {new, old} == {"head.weight", "embedding.weight"}
    assert torch.equal(after.weights[new], before.weights[old]) and torch.equal(after.weights[old], before.weights[old])
    sites = {site.name: site for site in find_sites(after)}
    assert new in sites and old not in sites and not sites[new].shared_with
    assert_equivalent(before, after, [ids], tolerance=0)


def test_nothing_is_copied_where_nothing_is_tied():
    before, after, _, (report,) = before_and_after(Decoder(shape()), Untie())
    assert not report.done and not report.skipped and set(after.weights) == set(before.weights)


def test_a_layer_that_is_used_twice_stays_one_matrix():
    layer = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(3, 8)
    program = capture(nn.Sequential(layer, nn.ReLU(), layer), (x,))
    weights = set(program.weights)
    (report,) = rewrite(program, Untie(), batches=[[x]])
    assert set(program.weights) == weights and not report.done
    assert {place.reason for place in report.skipped} == {
        "several sites share this weight: one matrix must serve them all"
    }


def test_a_weight_that_no_module_could_hold_is_not_copied():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 8)

        def forward(self, ids):
            return nn.functional.linear(self.table(ids), self.table.weight)

    ids = torch.randint(0, 16, (2, 3))
    program = capture(Reads().requires_grad_(False), (ids,))
    (report,) = rewrite(program, Untie(), batches=[[ids]])
    assert not report.done and "no module could hold a copy" in report.skipped[0].reason


def test_experts_keep_their_stack():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return (x @ self.stack) * self.stack.sum()

    before, after, (report,) = rewritten(Experts(), Untie(), x=torch.randn(2, 3, 8, dtype=torch.float64))
    assert not report.done and not report.skipped and set(after.weights) == set(before.weights)


class TableLast(nn.Module):
    """A linear whose weight's name is its own, and a table that shares it under another name."""

    def __init__(self, scale=False):
        super().__init__()
        self.head, self.table, self.scale = nn.Linear(8, 16, bias=False), nn.Embedding(16, 8), scale
        self.table.weight = self.head.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x) * (self.head.weight.norm() if self.scale else 1)


def test_the_table_gets_the_copy_where_the_name_is_the_linears():
    before, after, (report,) = rewritten(TableLast(), Untie(), x=torch.randint(16, (2, 3)))
    assert report.done == ["table.weight from head.weight"] and not report.renamed
    (site,) = find_sites(after)
    assert site.name == "head.weight" and not site.shared_with
    assert after.aliases.get("head.weight") == [] and after.aliases["table.weight"] == []


def test_a_copy_is_named_by_its_own_module():
    """Three paths of one tensor: the linear's copy takes the linear's, the tables keep the others."""

    class Three(TableLast):
        def __init__(self):
            super().__init__()
            self.another = nn.Embedding(16, 8)
            self.front, self.table, self.head = self.table, None, self.head
            self.another.weight = self.head.weight

        def forward(self, ids):
            return self.head(self.front(ids) + self.another(ids))

    model = Three()
    order = {name: getattr(model, name) for name in ("another", "front", "head")}
    for name in order:
        delattr(model, name)
    for name, module in order.items():
        setattr(model, name, module)
    _, after, (report,) = rewritten(model, Untie(), x=torch.randint(16, (2, 3)))
    assert report.renamed == {"head.weight": "another.weight"}
    assert after.aliases["another.weight"] == ["front.weight"]


def test_a_reader_without_a_path_of_its_own_is_named():
    class Norm(TableLast):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 8)

        def forward(self, ids):
            return self.head(self.table(ids)) * self.head.weight.norm()

    before, after, (report,) = rewritten(Norm(), Untie(), x=torch.randint(16, (2, 3)))
    assert not report.done and set(after.weights) == set(before.weights)
    assert "no attribute path of its own" in report.skipped[0].reason or "no module" in report.skipped[0].reason
