"""What is found of an attention without a cache, what is not, and that a wrong finding is not exported."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from onnx_models import build_encoder, encoder_inputs, trace_encoder
from torch import nn
from zoo import build

import qcompile
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fuse_all import fuse_all
from qcompile.codegen.onnx.fusions.attention import mha
from qcompile.codegen.onnx.fusions.attention.head_channels import HeadChannels
from qcompile.codegen.onnx.fusions.attention.match_mha import (
    MultiHeadAttentionMatch,
    MultiHeadAttentionMatcher,
    match_multi_head_attentions,
)
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.ir.capture import capture
from qcompile.recipe.certificate import relative_error


class Attention(nn.Module):
    """Two heads of 8 channels in eager operators; `mask` makes what is added to the scores of the hidden states."""

    def __init__(self, mask):
        super().__init__()
        self.linears, self.mask = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), mask

    def forward(self, x):
        q, k, v = (linear(x).unflatten(-1, (2, 8)).transpose(1, 2) for linear in self.linears)
        scores = q @ k.transpose(-1, -2) * 0.5 + self.mask(x)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def full_like_causal(x):
    """Of the shape of the hidden states, not of their values."""
    return torch.full_like(x[:, :, :1], -torch.inf).expand(-1, -1, x.shape[1]).triu(1)[:, None]


@pytest.mark.parametrize(
    "mask,causal,biases",
    [(lambda x: 0, False, 0), (full_like_causal, True, 0), (lambda x: x.mean(-1)[:, None, None], False, 1)],
    ids=["none", "full_like", "of the values"],
)
def test_masks_that_are_none_or_causal_are_no_bias(mask, causal, biases):
    torch.manual_seed(0)
    program = capture(Attention(mask).eval(), (torch.randn(2, 5, 16),), {})
    (found,) = match_multi_head_attentions(program)
    assert isinstance(found, MultiHeadAttentionMatch), found
    assert found.is_causal == causal and len(found.biases) == biases and found.padding_mask is None
    assert found.heads == 2 and found.scale == pytest.approx(0.5)
    query, key, value = found.qkv
    assert all(isinstance(part, HeadChannels) and part.rows.tolist() == list(range(16)) for part in (query, value))
    assert found.keys_transposed and not isinstance(key, HeadChannels), "as a matmul reads them"


def test_a_soft_cap_is_an_obstacle():
    class Capped(Attention):
        def forward(self, x):
            q, k, v = (linear(x).unflatten(-1, (2, 8)).transpose(1, 2) for linear in self.linears)
            weights = (torch.tanh(q @ k.transpose(-1, -2) / 30.0) * 30.0).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

    (found,) = match_multi_head_attentions(capture(Capped(None).eval(), (torch.randn(2, 5, 16),), {}))
    assert isinstance(found, Obstacle) and "soft cap" in found.reason


def test_a_mask_that_hides_everything_from_a_token_is_skipped():
    traced = trace_encoder(build_encoder("modernbert"), encoder_inputs("modernbert", True))
    inputs = traced.module.flatten(traced.module.sample_inputs())
    want = traced.program(*inputs)
    report, _ = fuse_all(traced.program, None)
    assert len(report.skipped) == 2
    assert all("tokens may attend to none" in place.reason for place in report.skipped)
    assert relative_error(traced.program(*inputs), want) < 1e-5


@pytest.mark.parametrize("flaw", ["scale", "padding", "heads", "bias", "causal"])
def test_a_wrong_attention_of_an_encoder_is_not_exported(flaw, tmp_path, monkeypatch):
    real = MultiHeadAttentionMatcher.match

    def wrong(self):
        found = real(self)
        flipped = dataclasses.replace(found.qkv[1], rows=found.qkv[1].rows.flip(0))
        change = {
            "scale": dict(scale=found.scale * 2), "padding": dict(padding_mask=None), "causal": dict(is_causal=True),
            "heads": dict(qkv=(found.qkv[0], flipped, found.qkv[2])), "bias": {},
        }  # fmt: skip
        return dataclasses.replace(found, **change[flaw])

    monkeypatch.setattr(MultiHeadAttentionMatcher, "match", wrong)
    if flaw == "bias":
        real_split = mha._split_biases
        monkeypatch.setattr(mha, "_split_biases", lambda *args: (real_split(*args)[0], None))
    model = build("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query.weight" in name or "key.weight" in name:
                parameter.mul_(20)  # random scores are so small that everybody looks everywhere
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(model, tmp_path / "m", example=encoder_inputs("bert", True), progress=False)
