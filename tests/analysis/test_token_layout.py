"""Token layouts: which axes of a value hold the texts and the tokens of a mask, and which rows were moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from padded_batches import LAYOUTS, decoder
from torch import nn
from zoo import build

from qcompile.analysis.facts import Facts
from qcompile.analysis.sites import find_sites
from qcompile.analysis.token_layout import TokenLayout, TokenLayouts, _quotient, _side
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


def test_rows_of_both_sides_are_no_texts_of_the_encoder():
    """Flattened rows are followed by the operands, of which the first here is of the other side."""

    class Gated(TwoSides):
        def forward(self, x, attention_mask, decoder_x):
            memory = (self.encode(x) * attention_mask[..., None]).reshape(-1, 4)
            return self.out(memory * self.decode(decoder_x).reshape(-1, 4))

    x = torch.randn(2, 3, 4)
    inputs = {"x": x, "attention_mask": torch.ones(2, 3, dtype=torch.long), "decoder_x": x.clone()}
    program = capture(Gated(), (), inputs)
    _, layouts = layouts_of(program)
    out = next(site for site in find_sites(program) if site.name == "out.weight")
    (memory, _) = out.input.args
    assert layouts.of(memory).mask.name == "attention_mask" and layouts.of(out.input) is None


class Rows(nn.Module):
    """What `function` makes of rows, beside a mask that is read."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x, attention_mask):
        return self.function(self, x, attention_mask), x * attention_mask[..., None]


def layout_of(function, *, dynamic=True, shape=(2, 3, 4)):
    mask = torch.ones(shape[:2], dtype=torch.long)
    program = capture(Rows(function), (torch.randn(shape), mask), dynamic=dynamic)
    _, layouts = layouts_of(program)
    return program.outputs[0], layouts


ORDER = torch.tensor([3, 0, 5])
ON_ONE_AXIS = {
    "flat": (lambda m, x, a: x.reshape(-1, 4), {}),
    "tokens first": (lambda m, x, a: x.transpose(0, 1).reshape(-1, 4), {"tokens_first": True}),
    "halves of tokens": (lambda m, x, a: x.reshape(-1, 2), {"folded": 2}),
    "halves of rows": (lambda m, x, a: x.reshape(-1, 4).reshape(-1, 2), {"folded": 2}),
    "quarters by halves": (lambda m, x, a: x.reshape(-1, 2).reshape(-1, 1), {"folded": 4}),
    "rows again": (lambda m, x, a: x.reshape(-1, 4).reshape(-1, 2, 2), {}),
    "chosen": (lambda m, x, a: x.reshape(-1, 4)[ORDER], {"indices": 1}),
    "chosen twice": (lambda m, x, a: x.reshape(-1, 4)[ORDER][ORDER.flip(0) * 0], {"indices": 2}),
    "selected": (lambda m, x, a: x.reshape(-1, 4).index_select(0, ORDER), {"indices": 1}),
    "chosen and halved": (lambda m, x, a: x.reshape(-1, 4)[ORDER].reshape(-1, 2), None),
    "channels chosen": (lambda m, x, a: x.reshape(-1, 4)[:, ORDER % 4], None),
    "channels selected": (lambda m, x, a: x.reshape(-1, 4).index_select(1, ORDER % 4), None),
    "heads between batch and tokens": (lambda m, x, a: x.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, 4), None),
    "fewer": (lambda m, x, a: x.reshape(-1, 4)[1:] * 2, None),
    "for each expert": (lambda m, x, a: x.reshape(-1, 4).expand(5, -1, 4) * 2, {"tokens": (1,)}),
    "summed for each expert": (lambda m, x, a: (x.reshape(-1, 4).expand(5, -1, 4) * 2).sum(1), None),
    "of every expert": (lambda m, x, a: (x.reshape(-1, 4).expand(5, -1, 4) * 2).reshape(-1, 4), None),
}


@pytest.mark.parametrize("name", ON_ONE_AXIS)
def test_rows_on_one_axis(name):
    function, expected = ON_ONE_AXIS[name]
    node, layouts = layout_of(function)
    layout = layouts.of(node)
    if expected is None:
        assert layout is None
        return
    assert layout is not None and layout.batch is None
    assert layout.tokens == expected.get("tokens", (0,)) and layout.folded == expected.get("folded", 1)
    assert layout.tokens_first == expected.get("tokens_first", False)
    assert len(layout.indices) == len(set(layout.indices)) == expected.get("indices", 0)


def test_folded_heads_are_no_rows():
    """[B H, T, D] -> [B H T, D]: between two tokens of a sequence lie those of its other heads."""
    node, layouts = layout_of(lambda m, x, a: x.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, x.shape[1], 4) * 2)
    assert layouts.of(node).folded == 2
    node, layouts = layout_of(
        lambda m, x, a: (x.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, x.shape[1], 4) * 2).reshape(-1, 4)
    )
    assert layouts.of(node) is None


def test_a_weight_holds_no_tokens():
    node, layouts = layout_of(lambda m, x, a: x + m.weight, dynamic=False)
    program = next(iter(layouts._sizes))  # the mask
    weight = next(n for n in program.graph.nodes if n.op == "placeholder" and "weight" in n.name)
    assert layouts.of(weight) is None and layouts.of(node) == TokenLayout(program, 0, (1,))
    assert layouts.of(next(n for n in program.graph.nodes if n.name == "x")) == TokenLayout(program, 0, (1,))


def test_rows_that_may_hold_padding():
    for function, may in (
        (lambda m, x, a: x.flatten(0, 1).sort(0).values, True),
        (lambda m, x, a: x.transpose(0, 1)[..., 0].t().t().contiguous().sort(0).values, True),
        (lambda m, x, a: x[a.bool()], True),
        (lambda m, x, a: x.sum(1), False),
        (lambda m, x, a: (x.sum((0, 2)) * 2)[None], False),
        (lambda m, x, a: torch.ones(7, 4), False),
    ):
        node, layouts = layout_of(function)
        assert layouts.may_hold_padding(node) == may, function
    for axis, may in ((0, True), (1, False)):  # of fixed sizes: rows of the length, or of the batch
        node, layouts = layout_of(lambda m, x, a, axis=axis: x.sum(axis).sort(0).values, dynamic=False)
        assert layouts.may_hold_padding(node) == may


FIXED = {  # x [2, 3, 4] and the mask [2, 3], unless another shape is given
    "as many channels as tokens": (lambda m, x, a: x @ x.mT @ x[..., :3].mT, (2, 3, 4), TokenLayout(None, 0, (1,))),
    "as many channels as tokens, of all": (lambda m, x, a: x * 2, (2, 3, 3), TokenLayout(None, 0, (1,))),
    "as many heads as sequences": (
        lambda m, x, a: x.view(2, 3, 2, 2).transpose(1, 2) * 2, (2, 3, 4), TokenLayout(None, 0, (2,))
    ),
    "as many heads as sequences, behind the tokens of none": (
        lambda m, x, a: x.sum(0).view(3, 2, 2) * 2, (2, 3, 4), None
    ),
    "as many heads as tokens": (lambda m, x, a: x.view(2, 3, 3, 2).transpose(1, 2) * 2, (2, 3, 6), None),
    "as many sequences as tokens": (lambda m, x, a: x * 2, (3, 3, 4), TokenLayout(None, 0, (1,))),
    "as many channels as all tokens": (lambda m, x, a: x * 2, (2, 6, 4), TokenLayout(None, 0, (1,))),
    "sequences first, six rows": (lambda m, x, a: torch.ones(5, 6, 4) * x.sum(), (2, 3, 4), None),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_fixed_sizes(name):
    function, shape, expected = FIXED[name]
    node, layouts = layout_of(function, dynamic=False, shape=shape)
    found = layouts.of(node)
    assert (None if found is None else replace(found, mask=None)) == expected


def test_sides_of_inputs():
    class Node:
        def __init__(self, name):
            self.name = name

    names = {"labels": 2, "decoder_input_ids": 2, "encoder_attention_mask": 0, "input_ids": 1}
    assert {name: _side(Node(name)) for name in names} == names


def test_quotients():
    b, t = sympy.symbols("b t", positive=True, integer=True)
    assert (_quotient(4 * b * t, b * t), _quotient(b * t, t), _quotient(b + 1, b), _quotient(0, b)) == (
        4,
        None,
        None,
        None,
    )
    assert (_quotient(2 * b, 4 * b), _quotient(6, 2), _quotient(None, b), _quotient(b, None)) == (None, 3, None, None)
