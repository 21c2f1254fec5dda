"""Perplexity and agreement with a reference, against their definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from zoo import build

from qcompile.evaluation.perplexity import agreement, perplexity


def pieces():
    return [torch.randint(0, 100, (1, 12)) for _ in range(2)]


def test_perplexity_is_the_definition():
    """Windows longer than the 512 tokens that are read at once, and a model that returns bare logits."""
    logits = torch.randn(1, 700, 11)
    windows = [torch.randint(0, 11, (1, 700)), torch.randint(0, 11, (1, 5))]
    losses = [
        torch.nn.functional.cross_entropy(logits[0, : w.shape[1] - 1], w[0, 1:], reduction="none") for w in windows
    ]
    for wrap in (lambda x: x, lambda x: SimpleNamespace(logits=x)):
        found = perplexity(lambda input_ids, wrap=wrap: wrap(logits[:, : input_ids.shape[1]]), windows, progress=False)
        assert found == pytest.approx(math.exp(float(torch.cat(losses).mean())), rel=1e-5)


def test_agreement_is_perplexity_and_divergence():
    ours, theirs, windows = build("llama"), build("llama"), pieces()
    with torch.no_grad():
        theirs.lm_head.weight.mul_(1.5)
        both = [(ours(input_ids=w).logits[0], theirs(input_ids=w).logits[0]) for w in windows]
    found = agreement(ours, theirs, windows)
    assert found.perplexity == pytest.approx(perplexity(ours, windows, progress=False), rel=1e-5)
    a, b = (torch.cat([pair[i] for pair in both]).log_softmax(-1) for i in (0, 1))
    want = torch.nn.functional.kl_div(a, b, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(want), rel=1e-4)
    assert found.top1 == pytest.approx(float((a.argmax(1) == b.argmax(1)).float().mean()))


@pytest.mark.parametrize("windows,words", [([], "no window"), ([torch.zeros(1, 1, dtype=torch.int64)], "of 1 tokens")])
def test_what_predicts_nothing_is_refused(windows, words):
    for measure in (lambda: perplexity(None, windows, progress=False), lambda: agreement(None, None, windows)):
        with pytest.raises(ValueError, match=words):
            measure()


def test_an_impossible_text_has_an_infinite_perplexity():
    logits = torch.tensor([[[0.0, 1e4], [0.0, 1e4]]])
    windows = [torch.zeros(1, 2, dtype=torch.int64)]
    assert perplexity(lambda input_ids: logits, windows, progress=False) == math.inf
    assert math.isnan(perplexity(lambda input_ids: logits * math.nan, windows, progress=False))
