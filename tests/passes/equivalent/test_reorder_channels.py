"""ReorderChannels' law: channels in falling order of their absmax, folded into everyone who writes and reads them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from laws import before_and_after

from qcompile.analysis.channel_origin import FlowStops
from qcompile.analysis.scale_folding import groups_of_consumers
from qcompile.analysis.sites import find_sites
from qcompile.calibration.statistics import observe
from qcompile.passes import FoldNorm, ReorderChannels, Untie
from qcompile.passes.equivalent.reorder_channels import common_order
from qcompile.testing import assert_equivalent, decoders


@given(decoders())
@settings(max_examples=12)
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
