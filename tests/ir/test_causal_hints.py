"""Transformer stacks of PyTorch with a mask, and no word on whether it is causal, are traced to one graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.ir.capture import capture
from qcompile.ir.causal_hints import causal_hints_as_told

WORDS = {
    "src": torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)),
    "mask": nn.Transformer.generate_square_subsequent_mask(6),
}
WINDOW = WORDS["mask"].tril(0) + torch.full((6, 6), -torch.inf).tril(-3)
PADDING = torch.zeros(2, 6).masked_fill(torch.arange(6) >= torch.tensor([[6], [4]]), -torch.inf)
PAIR = {"tgt": WORDS["src"], "memory": WORDS["src"] + 1, "tgt_mask": WORDS["mask"]}


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def decoder():
    torch.manual_seed(0)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2).eval()


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (encoder, WORDS),
        (encoder, {**WORDS, "mask": WINDOW}),
        (encoder, {**WORDS, "src_key_padding_mask": PADDING}),
        (decoder, PAIR),
    ],
    ids=["causal", "window", "padded", "decoder"],
)
def test_a_stack_with_a_mask_is_one_graph_that_applies_it(make, batch):
    model = make()
    program = capture(model, batch)
    with torch.no_grad():
        found, want = program(*batch.values()), model(**batch)
        free = model(**{name: value for name, value in batch.items() if "mask" not in name})
    assert torch.allclose(found[0], want, atol=1e-5)
    assert not torch.allclose(found[0], free, atol=1e-2)


def test_a_calibrated_recipe_takes_a_stack_with_a_mask():
    model = encoder()
    with torch.no_grad():
        want = model(**WORDS)
        report = qcompile.quantize(model, "w4a16-gptq", [WORDS], progress=False)
        found = model(**WORDS)
    assert [site.quantized for site in report.sites] == ["linear" in site.name for site in report.sites]
    assert len(report.sites) == 8
    assert 0 < float((found - want).norm() / want.norm()) < 0.1


def test_a_hint_is_as_told_while_the_block_runs_and_looked_up_behind_it():
    detect = nn.modules.transformer._detect_is_causal_mask
    with causal_hints_as_told():
        told = [nn.modules.transformer._detect_is_causal_mask(WORDS["mask"], hint) for hint in (None, False, True)]
    assert told == [False, False, True]
    assert nn.modules.transformer._detect_is_causal_mask is detect
    assert detect(WORDS["mask"]) is True
