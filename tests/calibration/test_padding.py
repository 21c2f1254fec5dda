"""Padding: no statistic counts a position that the attention mask rules out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from padded_batches import LAYOUTS, decoder, padded, texts, unpadded
from torch import nn

from qcompile.analysis.facts import Facts
from qcompile.analysis.sites import find_sites
from qcompile.calibration.hessian import hessian_of
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.padding import CalibrationError, TokenMask, refuse_empty_batches
from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture

lengths = st.lists(st.integers(1, 14), min_size=1, max_size=4)


def close(found, want):
    return all(torch.allclose(found[name], want[name], rtol=1e-4, atol=1e-4) for name in want)


@given(st.sampled_from(LAYOUTS), lengths, st.booleans(), st.integers(0, 3), st.integers(0, 99))
def test_statistics_of_padded_texts_are_those_of_the_texts(layout, lengths, left, extra, seed):
    _, program = decoder(layout)
    rows = texts(lengths, seed)
    found = observe(program, [padded(rows, left=left, extra=extra)])
    want = observe(program, unpadded(rows))
    for kind in ("absmax", "keys", "key_means", "cached"):
        assert close(getattr(found, kind), getattr(want, kind)), kind
    assert not found.notes


@given(st.sampled_from(LAYOUTS), lengths, st.booleans(), st.integers(0, 3))
def test_hessians_of_padded_texts_are_those_of_the_texts(layout, lengths, left, extra):
    _, program = decoder(layout)
    rows = texts(lengths)
    runs = [LayerwiseRun(program, batches) for batches in ([padded(rows, left=left, extra=extra)], unpadded(rows))]
    for site in find_sites(program):
        for run in runs:
            run.advance(site.node)
        found, want = (hessian_of(run, site) for run in runs)
        assert torch.allclose(found, want, rtol=1e-4, atol=1e-4 * float(want.diagonal().max())), site.name
    assert not runs[0].notes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_padding_nothing_changes(layout):
    """Bit for bit: a mask of ones counts as none."""
    _, program = decoder(layout)
    batch = padded(texts([9, 9]))
    mask = TokenMask(program)
    tokens = mask.of(batch)
    value = torch.randn(2, 9, 16)
    assert not tokens.has_padding and tokens.select(program.outputs[0], value) is value
    flows = Facts(program).attentions
    whole = {}
    program.watch([flows[0].keys], batch, lambda node, value: whole.setdefault(node, value))
    keys = whole[flows[0].keys]
    keys = keys.transpose(-1, -2) if flows[0].keys_transposed else keys
    keys = keys if keys.ndim == 4 else keys[:, None]
    want = keys[:, :, 4:].abs().amax(-2).mean(0)
    assert torch.equal(observe(program, [batch]).keys[flows[0].keys.name], want)


class Named(nn.Module):
    """A linear on [B, T, K], and an input of any name beside it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)


def named(parameter, mask, x=None):
    """The program of a module whose second parameter has this name, and its batch."""
    space = {}
    exec(f"def forward(self, x, {parameter}): return self.inner(x) * 1 + {parameter}.sum() * 0", space)  # noqa: S102
    model = type("WithMask", (Named,), {"forward": space["forward"]})()
    x = torch.arange(24.0).reshape(2, 3, 4) if x is None else x
    program = capture(model, (x, mask))
    return program, [x, mask]


ONES = torch.tensor([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("parameter", "mask", "largest"),
    [
        ("attention_mask", ONES, 23.0),
        ("attention_mask", ONES.flip(0), 19.0),
        ("attention_mask", ONES.flip(0).bool(), 19.0),
        ("attention_mask", ONES.flip(0).float(), 19.0),
        ("mask", ONES.flip(0), 19.0),
        ("key_padding_mask", ~ONES.flip(0).bool(), 19.0),
        ("source_attention_mask", ONES.flip(0), 19.0),
        ("attention_mask_2", ONES.flip(0), 19.0),
        ("weights", ONES.flip(0), 23.0),
    ],
)
def test_which_inputs_are_masks(parameter, mask, largest):
    """By the name of the keyword; of [2, 3, 4] the last token is the largest."""
    program, batch = named(parameter, mask)
    statistics = observe(program, [batch])
    assert float(next(iter(statistics.absmax.values())).max()) == largest and not statistics.notes


@pytest.mark.parametrize(
    ("parameter", "mask"),
    [
        ("attention_mask", ONES.flip(0) * 2),
        ("attention_mask", torch.zeros(2, 3)),
        ("attention_mask", torch.zeros(2, 1, 3, 3)),
        ("attention_mask", (ONES.flip(0) - 1.0) * 1e9),
        ("mask", ~ONES.bool()),
        ("key_padding_mask", ONES),
    ],
)
def test_masks_of_another_kind_rule_nothing_out_and_the_report_says_so(parameter, mask):
    program, batch = named(parameter, mask)
    statistics = observe(program, [batch])
    assert float(next(iter(statistics.absmax.values())).max()) == 23.0
    assert statistics.notes == [f"{parameter} is not 2-D of 0 and 1: no position counts as padding by it"]


class Beside(Named):
    """A mask of attention, and another input named mask."""

    def forward(self, x, attention_mask, mask):
        return self.inner(x) * 1 + attention_mask.sum() * 0 + mask.sum() * 0


def test_an_input_named_mask_does_not_count_beside_an_attention_mask():
    x, ones = torch.arange(24.0).reshape(2, 3, 4), torch.ones_like(ONES)
    for mask, other, largest in ((ONES.flip(0), ones, 19.0), (ones, ONES.flip(0), 23.0)):
        program = capture(Beside(), (x, mask, other))
        assert [node.name for node in TokenMask(program).masks] == ["attention_mask"]
        assert float(next(iter(observe(program, [[x, mask, other]]).absmax.values())).max()) == largest


class TwoPlain(Named):
    """Two inputs that may each be the mask."""

    def forward(self, x, mask, mask_2):
        return self.inner(x) * 1 + mask.sum() * 0 + mask_2.sum() * 0


def test_of_two_inputs_named_mask_neither_is_taken():
    batch = [torch.arange(24.0).reshape(2, 3, 4), ONES.flip(0), ONES.flip(0)]
    statistics = observe(capture(TwoPlain(), tuple(batch)), [batch])
    assert float(next(iter(statistics.absmax.values())).max()) == 23.0 and not statistics.notes


class Chosen(nn.Module):
    """Rows in an order that the data decides, and a row that is padding wherever there is any."""

    def __init__(self):
        super().__init__()
        self.every, self.one = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, attention_mask):
        rows, order = x.reshape(-1, 4), attention_mask.reshape(-1).argsort(stable=True)
        return self.every(rows[order].relu()), self.one(rows[order[:1]].relu())


def test_rows_that_were_chosen_count_where_they_are_tokens():
    x = torch.arange(24.0).reshape(2, 3, 4)
    program = capture(Chosen(), (x, ONES))
    for mask, largest in ((ONES.flip(0), [19.0, 0.0]), (ONES, [23.0, 0.0]), (torch.ones_like(ONES), [23.0, 3.0])):
        statistics = observe(program, [[x, mask]])
        peaks = [statistics.absmax[site.input.name] for site in find_sites(program)]
        assert [float(peak.max()) for peak in peaks] == largest and not statistics.notes
    both = observe(program, [[x, ONES], [x, torch.ones_like(ONES)]])
    assert [float(both.absmax[site.input.name].max()) for site in find_sites(program)] == [23.0, 3.0]


def test_only_what_was_asked_for_is_observed():
    x, seen = torch.arange(24.0).reshape(2, 3, 4), []
    program = capture(Chosen(), (x, ONES))
    tokens, site = TokenMask(program).of([x, ONES]), find_sites(program)[0]
    tokens.watch([site.input], [x, ONES], lambda node, value, of: seen.append((node, of.rows(node, value).shape[0])))
    assert seen == [(site.input, 5)]


def test_an_error_is_one_line():
    program, (x, mask) = named("attention_mask", ONES)
    x = x.clone()
    x[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="batch 1 brings NaN or Inf to inner.weight") as error:
        observe(program, [[x, mask]])
    assert "\n" not in str(error.value)


def test_a_mask_of_other_dimensions_than_the_traced_one_is_not_read():
    program, (x, mask) = named("attention_mask", ONES)
    tokens = TokenMask(program)
    assert not tokens.of([x, mask.flip(0)[None]]).has_padding and list(tokens.unread) == ["attention_mask"]


class TwoMasks(Named):
    """Tokens by a mask, and pairs of tokens by another."""

    def forward(self, x, attention_mask, pair_attention_mask):
        return self.inner(x) * 1 + attention_mask.sum() * 0 + pair_attention_mask.sum() * 0


def test_a_mask_of_pairs_does_not_stop_the_other():
    x, batch = torch.arange(24.0).reshape(2, 3, 4), [ONES.flip(0), torch.zeros(2, 1, 3, 3)]
    statistics = observe(capture(TwoMasks(), (x, *batch)), [[x, *batch]])
    assert float(next(iter(statistics.absmax.values())).max()) == 19.0
    assert statistics.notes == ["pair_attention_mask is not 2-D of 0 and 1: no position counts as padding by it"]


@pytest.mark.parametrize(
    ("count", "says"), [(1, "a"), (2, "a, b"), (3, "a, b, c"), (4, "a, b, c and 1 more"), (5, "a, b, c and 2 more")]
)
def test_a_note_names_three_values_and_counts_the_others(count, says):
    mask = TokenMask(decoder()[1])
    mask.uncounted.update(dict.fromkeys("abcde"[:count]))
    assert mask.notes() == [f"padding counts in {says}: their rows cannot be related to the mask"]


def test_a_batch_without_a_token_is_refused_with_its_place():
    _, program = decoder()
    good = padded(texts([3, 5]))
    empty = [good[0], torch.zeros_like(good[1])]
    message = "batch 2 has no token: attention_mask rules all of them out. Fix: drop that batch"
    for run in (
        lambda data: refuse_empty_batches(program, data),
        lambda data: observe(program, data),
        lambda data: LayerwiseRun(program, data),
    ):
        with pytest.raises(CalibrationError) as error:
            run([good, empty])
        assert str(error.value) == message


def test_a_sequence_without_a_token_counts_for_nothing():
    _, program = decoder()
    rows = texts([6, 11])
    ids, mask = padded(rows)
    more = [torch.cat([ids, ids[:1]]), torch.cat([mask, torch.zeros_like(mask[:1])])]
    found, want = observe(program, [more]), observe(program, [[ids, mask]])
    assert all(close(getattr(found, kind), getattr(want, kind)) for kind in ("absmax", "keys", "key_means", "cached"))


def test_nan_at_padding_is_no_fault_of_the_batch():
    program = decoder()[1].copy()
    ids, mask = padded(texts([3, 5]))
    program.weights["table.weight"] = program.weights["table.weight"].clone()
    program.weights["table.weight"][0] = torch.nan  # of the padding token; values behind the attention spread it
    sites = find_sites(program)
    first = next(site for site in sites if site.name == "query.weight")
    run = LayerwiseRun(program, [[ids, mask]])
    run.advance(first.node)
    assert bool(torch.isfinite(hessian_of(run, first)).all())


def test_the_first_token():
    _, program = decoder()
    mask = TokenMask(program)
    rows = texts([3, 5])
    assert mask.of(padded(rows, left=True, extra=4)).first_token() == 4
    assert mask.of(padded(rows, extra=4)).first_token() == 0
    assert mask.of(padded(texts([5, 5]))).first_token() == 0


class Shuffled(nn.Module):
    """Tokens in another order, where nothing in the graph says which: what an operator of a library may do."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.pooler = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, attention_mask):
        y = torch.flip(self.first(x).view(-1, 4), [0])
        z = self.second(y).view(x.shape) * attention_mask[..., None]
        return self.pooler(z[:, 0])


def test_values_that_cannot_be_related_to_the_mask_count_whole_and_are_named_once():
    """A value of one row for each text has no padding, so nothing is said of it."""
    x = torch.randn(2, 3, 4)
    program = capture(Shuffled(), (x, ONES))
    statistics = observe(program, [[x, ONES]] * 2)
    (flip,) = [node.name for node in program.graph.nodes if "flip" in node.name]
    assert statistics.notes == [f"padding counts in {flip}: their rows cannot be related to the mask"]
    assert not observe(program, [[x, torch.ones_like(ONES)]]).notes


def test_only_what_may_hold_padding_is_named():
    x = torch.randn(2, 3, 4)
    program = capture(Shuffled(), (x, ONES))
    mask = TokenMask(program)
    tokens = mask.of([x, ONES])
    (flip,) = [node for node in program.graph.nodes if "flip" in node.name]
    (pooled,) = [node for node in program.graph.nodes if node.name == "select"]
    assert mask.layouts.of(pooled) is None and mask.layouts.of(flip) is None
    assert tokens.spread(pooled, torch.zeros(2, 4)) is None and not mask.uncounted
    assert tokens.spread(flip, torch.zeros(6, 4)) is None and list(mask.uncounted) == [flip.name]


def test_a_mask_of_another_size_than_the_value_is_not_used():
    x = torch.randn(2, 3, 4)
    program = capture(Shuffled(), (x, ONES))
    mask = TokenMask(program)
    tokens = mask.of([x, ONES])
    source = find_sites(program)[0].node.args[0]
    assert tokens.spread(source, x).squeeze(-1).equal(ONES == 1) and not mask.uncounted
    assert tokens.spread(source, torch.zeros(2, 5, 4)) is None and list(mask.uncounted) == [source.name]


def test_vectors_along_the_tokens_are_nobodys():
    x = torch.randn(2, 3, 4)
    program = capture(Shuffled(), (x, ONES))
    mask = TokenMask(program)
    tokens = mask.of([x, ONES])
    source = find_sites(program)[0].node.args[0]
    assert tokens.along(source, x).equal(ONES == 1) and not mask.uncounted
    assert tokens.along(source, x, channels=1) is None and list(mask.uncounted) == [source.name]


class TwoSides(nn.Module):
    """Two inputs with a mask of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, attention_mask, decoder_x, decoder_attention_mask):
        first = self.first(x) * attention_mask[..., None]
        return first, self.second(decoder_x) * decoder_attention_mask[..., None]


def test_each_side_is_cut_by_its_own_mask():
    x, other = torch.arange(24.0).reshape(2, 3, 4), torch.arange(32.0).reshape(2, 4, 4)
    masks = ONES.flip(0), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = [x, masks[0], other, masks[1]]
    statistics = observe(capture(TwoSides(), tuple(batch)), [batch])
    assert [float(found.max()) for found in statistics.absmax.values()] == [19.0, 23.0] and not statistics.notes


@pytest.mark.parametrize(
    ("padding", "first"), [((1, 2), 1), ((2, 1), 1), ((2, 2), 2), ((0, 2), 0), ((2, 0), 0), ((0, 0), 0)]
)
def test_the_first_token_of_two_masks_is_the_earlier_one(padding, first):
    masks = [torch.ones(2, 4, dtype=torch.long) for _ in padding]
    for mask, count in zip(masks, padding, strict=True):
        mask[:, :count] = 0
    batch = [torch.randn(2, 4, 4), masks[0], torch.randn(2, 4, 4), masks[1]]
    assert TokenMask(capture(TwoSides(), tuple(batch))).of(batch).first_token() == first
