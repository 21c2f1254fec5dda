"""What is found of an attention with a cache, and that a wrong finding is not exported."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from onnx_models import LENGTH, trace_decoder
from small_decoder import SmallDecoder, trace_small_decoder
from torch import nn
from zoo import build

import qcompile
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention import rotary_embedding
from qcompile.codegen.onnx.fusions.attention.match_gqa import (
    GroupQueryAttentionMatch,
    GroupQueryAttentionMatcher,
    match_group_query_attentions,
)
from qcompile.codegen.onnx.verify_outputs import ExportMismatch


@pytest.mark.parametrize("chunk", [24, 2048])
def test_what_is_known_of_an_attention(chunk, monkeypatch):
    monkeypatch.setattr(rotary_embedding, "CHUNK", chunk)
    program = trace_decoder(build("phi3")).program  # one product makes queries, keys and values
    found = match_group_query_attentions(program, LENGTH)[0]
    assert found.queries.source is found.keys.source is found.values.source
    assert found.queries.rows.tolist() == list(range(64))
    assert found.keys.rows.tolist() == list(range(64, 96)) and found.values.rows.tolist() == list(range(96, 128))
    assert found.heads == 4 and found.scale == pytest.approx(0.25) and found.window == -1
    model = build("phi3")
    positions = torch.arange(LENGTH)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, LENGTH, 64), positions)
    assert torch.allclose(found.rotary.cos, cos[0, :, :8], atol=1e-6)
    assert torch.allclose(found.rotary.sin, sin[0, :, :8], atol=1e-6)
    assert not found.rotary.interleaved


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "one each"])
def test_however_the_heads_of_a_cache_are_repeated(repeat):
    """Also by repeat_interleave, which is one operator."""
    (found,) = match_group_query_attentions(trace_small_decoder(SmallDecoder(repeat=repeat)), LENGTH)
    assert isinstance(found, GroupQueryAttentionMatch), found
    assert found.heads == (2 if repeat == "one each" else 4)
    assert len(found.keys.rows) == len(found.values.rows) == 32


def test_heads_that_are_repeated_in_another_order_are_an_obstacle():
    (found,) = match_group_query_attentions(trace_small_decoder(SmallDecoder(repeat="tile")), LENGTH)
    assert isinstance(found, Obstacle) and "not repeated in order" in found.reason


def test_a_cache_that_is_put_behind_is_an_obstacle():
    (found,) = match_group_query_attentions(trace_small_decoder(SmallDecoder(new_first=True)), LENGTH)
    assert isinstance(found, Obstacle) and "the past is not an input" in found.reason


def test_a_model_that_ends_before_the_positions_is_an_obstacle():
    program = trace_decoder(build("gpt2")).program  # a learned table of positions, of which the mask knows nothing
    assert all(isinstance(a, GroupQueryAttentionMatch) for a in match_group_query_attentions(program, LENGTH))

    class Table(nn.Module):
        """A rotary embedding by a table of 16 positions."""

        def __init__(self, inner):
            super().__init__()
            cos, sin = inner(torch.zeros(1, 16, 64), torch.arange(16)[None])
            self.register_buffer("cos", cos[0])
            self.register_buffer("sin", sin[0])

        def forward(self, x, position_ids):
            return self.cos[position_ids], self.sin[position_ids]

    model = build("llama")
    model.model.rotary_emb = Table(model.model.rotary_emb)
    found = match_group_query_attentions(trace_decoder(model).program, LENGTH)
    assert all(isinstance(a, Obstacle) and "cannot be computed for 64 positions" in a.reason for a in found)
    found = match_group_query_attentions(trace_decoder(model).program, 16)
    assert all(isinstance(a, GroupQueryAttentionMatch) for a in found)


@pytest.mark.parametrize("flaw", ["rows", "scale", "window", "sin"])
def test_a_wrong_attention_is_not_exported(flaw, tmp_path, monkeypatch):
    real = GroupQueryAttentionMatcher.match

    def wrong(self):
        found = real(self)
        if flaw == "rows":
            return dataclasses.replace(found, keys=dataclasses.replace(found.keys, rows=found.keys.rows.flip(0)))
        if flaw == "scale":
            return dataclasses.replace(found, scale=found.scale * 2)
        if flaw == "window":
            return dataclasses.replace(found, window=2)
        return dataclasses.replace(found, rotary=dataclasses.replace(found.rotary, sin=-found.rotary.sin))

    monkeypatch.setattr(GroupQueryAttentionMatcher, "match", wrong)
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(build("llama"), tmp_path / "m", progress=False)
