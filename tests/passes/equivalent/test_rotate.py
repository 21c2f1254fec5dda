"""Rotate's law: streams and heads in other orthogonal bases, folded into the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import before_and_after, rewrite, shape
from torch import nn

from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.numerics.hadamard import random_orthogonal
from qcompile.passes import AWQ, FoldNorm, OnlineHadamard, Rotate, SmoothQuant, SmoothQuantPlus, Untie
from qcompile.passes.equivalent.rotate import conflicts, rotate_columns, rotate_rows
from qcompile.testing import Decoder, assert_equivalent, decoders


@given(decoders())
@settings(max_examples=12)
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
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList([nn.RMSNorm(8, elementwise_affine=False) for _ in range(2)])
        self.double().requires_grad_(False)

    def forward(self, ids):
        x, y = self.table(ids) + self.shift, self.table(10 - ids) + self.shift
        x, y = x + self.first(self.norms[0](x)), y + self.second(self.norms[1](y))
        return self.head(x) * self.head(y)


def test_a_table_of_two_streams_is_rotated_once():
    ids = torch.randint(11, (2, 4))
    before = capture(TwoHalves(), (ids,))
    after = before.copy()
    (report,) = rewrite(after, Rotate(heads=False), batches=[[ids]])
    assert_equivalent(before, after, [ids])
    assert len(report.done) + len(report.skipped) == 1


def test_a_long_vector_is_rotated_whole():
    matrix = random_orthogonal(64, 0)
    vector = torch.randn(8192, dtype=torch.float64)
    want = (vector.view(-1, 64) @ matrix).flatten()
    assert torch.allclose(rotate_columns(vector, matrix), want)
