"""What is found between the scores and the softmax of an attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from onnx_models import LENGTH, build_decoder
from small_decoder import SmallDecoder, trace_small_decoder

import qcompile
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention.match_gqa import (
    GroupQueryAttentionMatch,
    GroupQueryAttentionMatcher,
    match_group_query_attentions,
)
from qcompile.codegen.onnx.fusions.attention.match_scores import ScoreCurve
from qcompile.codegen.onnx.verify_outputs import ExportMismatch


def by_distance(s):  # of key and query, not by the position of the key: |q - k|^2
    far = torch.arange(s.shape[-2])[:, None] + s.shape[-1] - s.shape[-2] - torch.arange(s.shape[-1])
    return s / 4 + far * far * -0.1


BETWEEN = {
    "scale": lambda s: s / 4,
    "cap": lambda s: torch.tanh(s / 4 / 7) * 7,
    "negative": lambda s: s * -0.25,
    "bent": lambda s: torch.tanh(torch.tanh(s / 4 / 7) * 2) * 7,
    "by_distance": by_distance,
    "uneven": lambda s: s * torch.tensor([0.25, 0.5])[:, None, None],  # every head another scale
}


@pytest.mark.parametrize(
    "kind,words",
    [
        ("scale", None),
        ("cap", None),
        ("negative", "positive number"),
        ("bent", "more of the scores than a scale and a soft cap"),
        ("by_distance", "not one of the keys' positions"),
        ("uneven", "more of the scores than a scale and a soft cap"),
    ],
)
def test_what_stands_between_scores_and_softmax(kind, words):
    torch.manual_seed(0)
    (found,) = match_group_query_attentions(trace_small_decoder(SmallDecoder(BETWEEN[kind])), LENGTH)
    if words is None:
        assert isinstance(found, GroupQueryAttentionMatch) and found.bias is None
        assert found.scale == pytest.approx(0.25, rel=1e-4)
        assert found.softcap == pytest.approx(7.0 if kind == "cap" else 0)
    else:
        assert isinstance(found, Obstacle) and words in found.reason, found


def test_a_curve_with_and_without_a_cap():
    scores = torch.tensor([-100.0, 0.0, 1.0])
    assert torch.equal(ScoreCurve(0.5, 0.0)(scores), scores / 2)
    assert torch.allclose(ScoreCurve(0.5, 3.0)(scores), 3 * torch.tanh(scores / 6))


@pytest.mark.parametrize("flaw", ["cap", "bias", "scale"])
def test_a_wrong_curve_or_bias_is_not_exported(flaw, tmp_path, monkeypatch):
    real = GroupQueryAttentionMatcher.match
    name = "bloom" if flaw == "bias" else "gemma2"

    def wrong(self):
        found = real(self)
        change = {"cap": dict(softcap=3.0), "scale": dict(scale=found.scale * 2)}
        change["bias"] = dict(bias=None if found.bias is None else -found.bias)
        return dataclasses.replace(found, **change[flaw])

    monkeypatch.setattr(GroupQueryAttentionMatcher, "match", wrong)
    model = build_decoder(name)
    with torch.no_grad():  # scores that a cap can change
        for layer_name, parameter in model.named_parameters():
            if "q_proj" in layer_name or "k_proj" in layer_name:
                parameter.mul_(30)
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(model, tmp_path / "m", progress=False)
