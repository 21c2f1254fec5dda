"""Attentions whose scores are capped, biased or spelled out: what is found of them, and what the files compute."""

from __future__ import annotations

import collections
import dataclasses
import warnings

import onnx
import pytest
import torch
import transformers as tf
from torch import nn
from zoo import ZOO, build

import qcompile
from qcompile.analysis.obstacle import Obstacle
from qcompile.codegen.onnx.fusions.attention import match_gqa as attentions
from qcompile.codegen.onnx.fusions.attention.match_gqa import CachedAttention, find_attentions
from qcompile.codegen.onnx.ops.attention_ops import group_attention
from qcompile.codegen.onnx.tracing.signature import WithCache
from qcompile.codegen.onnx.verify_outputs import ExportMismatch
from qcompile.generation.onnx_session import Session
from qcompile.ir.capture import from_exported

LENGTH = 64
ALIBI = {
    "bloom": ZOO["bloom"],  # slope times the number of the key, added inside the product
    "falcon": lambda: tf.FalconForCausalLM(  # the same rounded to bfloat16: no straight line
        tf.FalconConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "mpt": lambda: tf.MptForCausalLM(  # slope times the distance to the last one
        tf.MptConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=LENGTH, expansion_ratio=2)
    ),
}  # fmt: skip


def made(name, monkeypatch=None):
    if name in ZOO and name not in ALIBI:
        return build(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, name, ALIBI[name])
        return build(name)


def traced(model):
    wrapper = WithCache(model, 64)
    exported = torch.export.export(wrapper, wrapper.arguments(), dynamic_shapes=wrapper.dynamic_shapes(), strict=False)
    return from_exported(exported, wrapper)


def counts(folder):
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return graph, collections.Counter(n.op_type for n in graph.node)


@pytest.mark.parametrize("name", [*ALIBI, "gemma2"])
@pytest.mark.parametrize("recipe", [None, "w4a16"])
def test_the_file_generates_the_same(name, recipe, tmp_path):
    model = made(name)
    with torch.no_grad():
        for parameter in model.parameters():  # what layers add must outweigh the token, or it repeats for ever
            if parameter.ndim == 2 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(6)
    ids = torch.tensor([[5, 9, 17, 33, 90, 8, 51, 70]])
    if recipe:
        qcompile.quantize(model, recipe, [{"input_ids": ids}], progress=False)
    report = qcompile.export_onnx(model, tmp_path / "m", accuracy_level=1, progress=False)
    graph, found = counts(tmp_path / "m")
    attention = next(n for n in graph.node if n.op_type == "GroupQueryAttention")
    assert (
        found["GroupQueryAttention"] == 2
        and not found["Softmax"]
        and not next(p for p in report.passes if "operators" in p.name).skipped
    )
    assert (len(attention.input) > 10 and bool(attention.input[10])) == (name in ALIBI)
    cap = next(a.f for a in attention.attribute if a.name == "softcap")
    assert cap == pytest.approx(50.0 if name == "gemma2" else 0.0)
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 8:].tolist()
    assert list(Session(tmp_path / "m").stream(ids, 12)) == want


def test_the_slopes_of_the_heads():
    model = made("bloom")
    found = find_attentions(traced(model), LENGTH)
    slopes = 2.0 ** -torch.arange(2.0, 10, 2)  # ALiBi's for four heads
    for attention in found:
        assert isinstance(attention, CachedAttention) and attention.cap == 0 and attention.scale == pytest.approx(0.25)
        assert attention.bias.shape == (4, LENGTH) and attention.window == -1
        assert torch.allclose(attention.bias, slopes[:, None] * (torch.arange(LENGTH) - LENGTH + 1), atol=1e-5)


def test_the_operator_adds_the_bias_behind_the_cap():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 16) for _ in range(3))
    past = [torch.randn(1, 1, 3, 16) for _ in range(2)]
    bias = torch.randn(1, 1, 2, 5)
    lengths = torch.tensor([4], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    got, *_ = group_attention(query, key, value, *past, *lengths, None, None, 1, 0.5, -1, False, 2.0, bias)
    keys, values = torch.cat([past[0][0, 0], key[0]]), torch.cat([past[1][0, 0], value[0]])
    for token in range(2):
        seen = 4 + token
        scores = 2.0 * torch.tanh(query[0, token] @ keys[:seen].t() * 0.5 / 2.0) + bias[0, 0, token, :seen]
        assert torch.allclose(got[0, token], scores.softmax(-1) @ values[:seen], atol=1e-5)


@pytest.mark.parametrize("flaw", ["cap", "bias", "scale"])
def test_a_wrong_attention_is_not_exported(flaw, tmp_path, monkeypatch):
    real = attentions._Recogniser.result
    name = "bloom" if flaw == "bias" else "gemma2"

    def wrong(self):
        found = real(self)
        change = {"cap": dict(cap=3.0), "scale": dict(scale=found.scale * 2)}
        change["bias"] = dict(bias=None if found.bias is None else -found.bias)
        return dataclasses.replace(found, **change[flaw])

    monkeypatch.setattr(attentions._Recogniser, "result", wrong)
    model = made(name)
    with torch.no_grad():  # scores that a cap can change
        for layer_name, parameter in model.named_parameters():
            if "q_proj" in layer_name or "k_proj" in layer_name:
                parameter.mul_(30)
    with pytest.raises(ExportMismatch):
        qcompile.export_onnx(model, tmp_path / "m", progress=False)


class Eager(nn.Module):
    """One attention with a cache that is spelled out, with something between scores and softmax."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.embed = nn.Embedding(16, 32)
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, ids, mask, keys, values):
        q, k, v = (linear(self.embed(ids)).unflatten(-1, (2, 16)).transpose(1, 2) for linear in self.linears[:3])
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        new, total = ids.shape[1], mask.shape[1]
        hidden = torch.arange(total) > torch.arange(new)[:, None] + total - new
        hidden = hidden | (mask == 0)[:, None, None]
        scores = self.between(q @ keys.transpose(-1, -2))
        weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
        return self.linears[3]((weights @ values).transpose(1, 2).flatten(2)), keys, values


def between(kind):
    def scale(s):
        return s / 4

    def cap(s):
        return torch.tanh(s / 4 / 7) * 7

    def negative(s):
        return s * -0.25

    def bent(s):
        return torch.tanh(torch.tanh(s / 4 / 7) * 2) * 7

    def by_distance(s):  # of key and query, not by the place of the key: |q - k|^2
        far = torch.arange(s.shape[-2])[:, None] + s.shape[-1] - s.shape[-2] - torch.arange(s.shape[-1])
        return s / 4 + far * far * -0.1

    def uneven(s):  # every head another scale
        return s * torch.tensor([0.25, 0.5])[:, None, None]

    return locals()[kind]


@pytest.mark.parametrize(
    "kind,words",
    [
        ("scale", None),
        ("cap", None),
        ("negative", "positive number"),
        ("bent", "more of the scores than a scale and a soft cap"),
        ("by_distance", "not one of the keys' places"),
        ("uneven", "more of the scores than a scale and a soft cap"),
    ],
)
def test_what_stands_between_scores_and_softmax(kind, words):
    torch.manual_seed(0)
    model = Eager(between(kind)).eval().requires_grad_(False)
    free = torch.export.Dim.DYNAMIC
    arguments = (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long))
    arguments += (torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16))
    shapes = ({0: free, 1: free}, {0: free, 1: free}, {0: free, 2: free}, {0: free, 2: free})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = from_exported(torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False), model)
    (found,) = find_attentions(program, LENGTH)
    if words is None:
        assert isinstance(found, CachedAttention) and found.bias is None
        assert found.scale == pytest.approx(0.25, rel=1e-4) and found.cap == pytest.approx(7.0 if kind == "cap" else 0)
    else:
        assert isinstance(found, Obstacle) and words in found.reason, found
