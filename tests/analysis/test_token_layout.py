"""Token layouts: which axes of a value hold the texts and the tokens of a mask, and which rows were moved."""

from __future__ import annotations

import pytest
import torch
from padded_batches import LAYOUTS, decoder
from torch import nn
from zoo import build

from qcompile.analysis.facts import Facts
from qcompile.analysis.sites import find_sites
from qcompile.analysis.token_layout import TokenLayout, TokenLayouts
from qcompile.ir.capture import capture

IDS = torch.randint(3, 60, (2, 8))
MASK = torch.tensor([[True, True, False], [True, False, False]])


def layouts_of(program):
    masks = [n for n in program.inputs if n.name.endswith("attention_mask")]
    return masks, TokenLayouts(program, masks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_axes_of_a_decoder(layout):
    _, program = decoder(layout)
    (mask,), layouts = layouts_of(program)
    first = TokenLayout(mask, 0, (1,))
    inner = {"flat": TokenLayout(mask), "tokens first": TokenLayout(mask, 1, (0,))}.get(layout, first)
    expected = {"up.weight": inner, "gate.weight": inner, "down.weight": inner}
    for site in find_sites(program):
        assert layouts.of(site.input) == expected.get(site.name, first), site.name
    (flow,) = Facts(program).attentions
    keys = {
        "folded heads": TokenLayout(mask, 0, (1,), folded=2),
        "decomposed": TokenLayout(mask, 0, (3,)),
    }.get(layout, TokenLayout(mask, 0, (2,)))
    assert layouts.of(flow.keys) == keys
    assert layouts.of(program.outputs[0]) == first


def test_masks_in_the_layouts_of_values():
    _, program = decoder()
    (mask,), _ = layouts_of(program)
    index = program.outputs[0]  # any node
    assert torch.equal(TokenLayout(mask, 0, (1,)).spread(MASK, {}, 3)[..., 0], MASK)
    assert torch.equal(TokenLayout(mask, 1, (0,)).spread(MASK, {}, 3)[..., 0], MASK.t())
    assert torch.equal(TokenLayout(mask, 0, (2,)).spread(MASK, {}, 4)[:, 0, :, 0], MASK)
    pairs = TokenLayout(mask, 0, (1, 2)).spread(MASK, {}, 4)[..., 0]
    assert torch.equal(pairs, MASK[:, :, None] & MASK[:, None, :])
    folded = TokenLayout(mask, 0, (1,), folded=2).spread(MASK, {}, 3)[..., 0]
    assert torch.equal(folded, MASK[[0, 0, 1, 1]])
    flat = TokenLayout(mask).spread(MASK, {}, 2)[:, 0]
    assert flat.tolist() == [1, 1, 0, 1, 0, 0]
    assert TokenLayout(mask, tokens_first=True).spread(MASK, {}, 2)[:, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert TokenLayout(mask, folded=2).spread(MASK, {}, 1).tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    chosen = TokenLayout(mask, indices=(index,)).spread(MASK, {index: torch.tensor([5, 3, 0, 2])}, 2)
    assert chosen[:, 0].tolist() == [0, 1, 1, 0]
    assert TokenLayout(mask, tokens=(1,)).spread(MASK, {}, 3).shape == (1, 6, 1)


def test_rows_that_experts_read_are_followed_to_the_index_that_chose_them():
    """As many as tokens times experts for each, in the order of the experts: sizes would say nothing of that."""
    program = capture(build("mixtral"), (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    (mask,), layouts = layouts_of(program)
    experts = [site for site in find_sites(program) if site.kind == "experts"]
    assert len(experts) == 4
    for site in experts:
        layout = layouts.of(site.input)
        assert layout is not None and layout.mask is mask and layout.batch is None and len(layout.indices) == 1


class Sorted(nn.Module):
    """A row for each token, in an order that the data decides: by an index, or by an operator that hides it."""

    def __init__(self, hidden):
        super().__init__()
        self.inner, self.hidden = nn.Linear(4, 4), hidden

    def forward(self, x, attention_mask):
        rows = x.reshape(-1, 4)
        order = rows[:, 0].argsort()
        moved = rows.sort(0).values if self.hidden else rows[order]
        return self.inner(moved * 2).view(x.shape) * attention_mask[..., None]


@pytest.mark.parametrize("hidden", [False, True])
def test_as_many_rows_as_tokens_need_not_be_in_their_order(hidden):
    program = capture(Sorted(hidden), (torch.randn(2, 3, 4), MASK.long()))
    _, layouts = layouts_of(program)
    (site,) = find_sites(program)
    layout = layouts.of(site.input)
    assert layout is None if hidden else [n.name for n in layout.indices] == ["argsort"]
    assert layouts.may_hold_padding(site.input)


class TwoSides(nn.Module):
    """Texts of an encoder that a decoder's tokens read; both of one length, which the sizes do not tell apart."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.cross, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, attention_mask, decoder_x, decoder_attention_mask=None):
        memory = self.encode(x) * attention_mask[..., None]
        own = self.decode(decoder_x)
        if decoder_attention_mask is not None:
            own = own * decoder_attention_mask[..., None]
        return self.out(own + torch.softmax(own @ self.cross(memory).transpose(1, 2), -1) @ memory)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_each_side_of_an_encoder_decoder_has_its_own_mask(both, dynamic):
    x, ones = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.long)
    inputs = {"x": x, "attention_mask": ones, "decoder_x": x.clone()}
    inputs |= {"decoder_attention_mask": ones.clone()} if both else {}
    program = capture(TwoSides(), (), inputs, dynamic=dynamic)
    _, layouts = layouts_of(program)
    found = {site.name: layouts.of(site.input) for site in find_sites(program)}
    names = {name: None if layout is None else layout.mask.name for name, layout in found.items()}
    own = "decoder_attention_mask" if both else None
    assert names == {
        "encode.weight": "attention_mask",
        "cross.weight": "attention_mask",
        "decode.weight": own,
        "out.weight": own,
    }
