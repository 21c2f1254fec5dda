"""Rotary tables are read off the graph, unless they are none."""

from __future__ import annotations

import pytest
import torch
from onnx_models import LENGTH, trace_decoder
from torch import nn
from zoo import build

from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.match_gqa import match_group_query_attentions
from qcompile.codegen.onnx.fusions.attention.rotary_embedding import RotaryTables


class Changed(nn.Module):
    """A rotary embedding with other tables."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x, position_ids):
        return self.change(self.inner, x, position_ids)


def grow_with_the_text(inner, x, position_ids):
    return inner(x, position_ids * 8 / (position_ids.max() + 1))


def scale_by_position(inner, x, position_ids):
    cos, sin = inner(x, position_ids)
    return cos * 0 + 1 + position_ids[..., None] / 9, sin * 0


def rotate_and_shrink(inner, x, position_ids):
    cos, sin = inner(x, position_ids)
    half = torch.cat([torch.ones(8), torch.full((8,), 0.5)])  # the second of each pair only
    return cos, sin * half


@pytest.mark.parametrize(
    "change,words",
    [
        (grow_with_the_text, "length of the text"),
        (scale_by_position, "scaled by position"),
        (rotate_and_shrink, "in another way than by a rotary embedding"),
    ],
)
def test_other_functions_of_the_position_are_obstacles(change, words):
    model = build("llama")
    model.model.rotary_emb = Changed(model.model.rotary_emb, change)
    found = match_group_query_attentions(trace_decoder(model).program, LENGTH)
    assert all(isinstance(a, Obstacle) and words in a.reason for a in found), found


def test_tables_are_equal_in_all_their_parts():
    cos, sin = torch.rand(5, 4), torch.rand(5, 4)
    tables = RotaryTables(cos, sin, False)
    assert tables.equals(RotaryTables(cos.clone(), sin.clone(), False))
    for other in (
        None,
        RotaryTables(cos, sin, True),
        RotaryTables(cos, -sin, False),
        RotaryTables(cos + 1, sin, False),
    ):
        assert not tables.equals(other)
