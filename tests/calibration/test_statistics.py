"""Statistics: maxima and means over all batches, and data that cannot be used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from padded_batches import LAYOUTS, decoder, padded, texts, unpadded
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from zoo import build, example

from qcompile.analysis import facts as facts_module
from qcompile.analysis.facts import Facts
from qcompile.calibration.ranks import Ranks
from qcompile.calibration.statistics import CalibrationError, observe
from qcompile.ir.capture import capture
from qcompile.memory.stored_tensor import StoredTensor

H, D, S = 2, 4, 12


class Attention(nn.Module):
    def __init__(self, decomposed=False):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.decomposed = decomposed

    def heads(self, x):
        return [f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.query, self.key, self.value)]

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.decomposed:
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        else:
            y = scaled_dot_product_attention(q, k, v)
        return self.out(torch.relu(y.transpose(1, 2).flatten(2)))


@pytest.fixture(params=[False, True])
def attention(request):
    model = Attention(request.param)
    batches = [[torch.randn(3, S, 8)], [2 * torch.randn(2, S, 8)]]
    return model, capture(model, (torch.randn(2, S, 8),)), batches


def test_the_input_of_every_site(attention):
    model, program, batches = attention
    statistics = observe(program, batches)
    facts = Facts(program)
    assert statistics.batches == 2 and statistics.absmax.keys() == {group.root.name for group in facts.consumers}
    want = torch.stack([x.abs().flatten(0, 1).amax(0) for (x,) in batches]).amax(0)
    assert torch.equal(statistics.absmax[program.inputs[0].name], want)
    (relu,) = [name for name in statistics.absmax if name.startswith("relu")]
    assert statistics.absmax[relu].shape == (8,) and statistics.absmax[relu].dtype == torch.float32


def test_keys_and_values(attention):
    """Of the mean only tokens behind the first four, whose keys are unlike all others."""
    model, program, batches = attention
    statistics = observe(program, batches)
    (flow,) = Facts(program).attentions
    with torch.no_grad():
        heads = [model.heads(x) for (x,) in batches]
    keys, values = (torch.cat([h[i] for h in heads]) for i in (1, 2))
    per_batch = [h[1][:, :, 4:] for h in heads]
    absmax = torch.stack([k.abs().amax(2).mean(0) for k in per_batch]).mean(0)
    means = torch.stack([k.mean((0, 2)) for k in per_batch]).mean(0)
    assert torch.allclose(statistics.keys[flow.keys.name], absmax, atol=1e-6)
    assert torch.allclose(statistics.key_means[flow.keys.name], means, atol=1e-6)
    assert torch.allclose(statistics.cached[flow.keys.name], keys.abs().amax((0, 2)), atol=1e-6)
    assert torch.allclose(statistics.cached[flow.values.name], values.abs().amax((0, 2)), atol=1e-6)


def test_short_sequences_keep_their_first_tokens():
    model = Attention()
    x = torch.randn(2, 8, 8)
    program = capture(model, (x,))
    (flow,) = Facts(program).attentions
    with torch.no_grad():
        keys = model.heads(x)[1]
    found = observe(program, [[x]]).key_means[flow.keys.name]
    assert torch.allclose(found, keys.mean((0, 2)), atol=1e-6)


@pytest.mark.parametrize("sites,attentions", [(True, False), (False, True)])
def test_only_what_is_requested_is_observed(attention, sites, attentions):
    _, program, batches = attention
    statistics = observe(program, batches, sites=sites, attentions=attentions)
    assert bool(statistics.absmax) == sites
    assert bool(statistics.keys) == bool(statistics.key_means) == bool(statistics.cached) == attentions


def test_known_facts_are_not_found_again(attention, monkeypatch):
    _, program, batches = attention
    facts = Facts(program)
    want = observe(program, batches, facts=facts)
    monkeypatch.setattr(facts_module, "find_sites", None)
    found = observe(program, batches, facts=facts)
    assert all(torch.equal(found.absmax[n], t) for n, t in want.absmax.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sites", [True, False])
def test_infinite_values_are_named(attention, bad, sites):
    _, program, batches = attention
    batches[1][0][0, 5, 0] = bad
    (flow,) = Facts(program).attentions
    node = program.inputs[0] if sites else flow.keys
    where = "query.weight" if sites else f"the keys of {flow.node.name}"
    with pytest.raises(CalibrationError) as error:
        observe(program, batches, sites=sites)
    assert str(error.value) == (
        f"batch 2 brings NaN or Inf to {where} (node {node.name}). Fix: drop that batch, or calibrate in float32"
    )


class Allocated(Attention):
    """Keys that are written in pieces into memory of their own, which holds anything before."""

    def heads(self, x):
        q, k, v = super().heads(x)
        keys = torch.empty_like(k).fill_(torch.nan)
        keys[..., :1] = k[..., :1]
        keys[..., 1:] = k[..., 1:]
        return q, keys, v


def test_memory_is_read_when_it_is_filled(attention):
    plain, _, batches = attention
    model = Allocated(plain.decomposed)
    model.load_state_dict(plain.state_dict())
    found = []
    for program in (capture(m, (torch.randn(2, S, 8),)) for m in (model, plain)):
        (flow,), statistics = Facts(program).attentions, observe(program, batches)
        name = flow.keys.name
        found.append((statistics.keys[name], statistics.key_means[name], statistics.cached[name]))
        found[-1] += (statistics.cached[flow.values.name],)
    assert all(torch.equal(got, want) for got, want in zip(*found, strict=True))


def test_an_empty_iterator_is_refused():
    program = capture(nn.Linear(8, 4), (torch.randn(2, 8),))
    with pytest.raises(CalibrationError, match="the calibration iterator is empty: give at least one batch"):
        observe(program, iter(()))


def test_nothing_but_vectors_is_kept():
    inputs = example("llama")
    program = capture(build("llama"), (), inputs)
    statistics = observe(program, [list(inputs.values())] * 2)
    tensors = [t for group in (statistics.absmax, statistics.keys, statistics.cached) for t in group.values()]
    assert tensors and all(t.ndim <= 2 and t.dtype == torch.float32 and not t.requires_grad for t in tensors)


def stored_copy(program):
    """The same program with weights that are read when they are needed, and how often each was."""
    copied, reads = program.copy(), {}

    def stored(name, weight):
        def read():
            reads[name] = reads.get(name, 0) + 1
            return weight.clone()

        return StoredTensor(weight, read)

    copied.weights = {name: stored(name, weight) for name, weight in program.weights.items()}
    return copied, reads


def assert_equal_statistics(found, want):
    assert (found.batches, found.notes) == (want.batches, want.notes)
    for field in dataclasses.fields(want):
        ours, theirs = getattr(found, field.name), getattr(want, field.name)
        if isinstance(theirs, dict):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), field.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("sites, attentions", [(True, True), (True, False), (False, True)])
def test_by_layer_is_by_batch(name, sites, attentions):
    """And reads every weight once for all batches."""
    inputs = example(name)
    program = capture(build(name), (), inputs)
    generator = torch.Generator().manual_seed(3)
    batches = [[torch.randint(3, 128, t.shape, generator=generator) for t in inputs.values()] for _ in range(3)]
    streamed, reads = stored_copy(program)
    found = observe(streamed, batches, sites=sites, attentions=attentions)
    assert_equal_statistics(found, observe(program, batches, sites=sites, attentions=attentions))
    assert found.batches == 3 and max(reads.values()) == 1


def test_by_layer_is_by_batch_where_memory_is_filled_late(attention):
    plain, _, batches = attention
    program = capture(Allocated(plain.decomposed), (torch.randn(2, S, 8),))
    assert_equal_statistics(observe(stored_copy(program)[0], batches), observe(program, batches))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("left", [False, True])
def test_by_layer_is_by_batch_with_padding(layout, left):
    _, program = decoder(layout)
    rows = texts([7, 3, 5])
    for batches in ([padded(rows, left=left, extra=2), padded(rows[:1])], unpadded(rows)):
        assert_equal_statistics(observe(stored_copy(program)[0], batches), observe(program, batches))


def test_by_layer_refuses_what_by_batch_does(attention):
    _, program, batches = attention
    streamed, _ = stored_copy(program)
    with pytest.raises(CalibrationError, match="the calibration iterator is empty: give at least one batch"):
        observe(streamed, iter(()))
    batches[1][0][0, 5, 0] = torch.nan
    with pytest.raises(CalibrationError, match="batch 2 brings NaN or Inf to query.weight"):
        observe(streamed, batches)


class OtherHalf(Ranks):
    """The first of two ranks, of which the other one has observed other batches."""

    def __init__(self, other):
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)
        object.__setattr__(self, "log", [])

    def raise_to_largest(self, tensor):
        self.log.append("max")
        torch.maximum(tensor, tensor * 0 + self.other, out=tensor)

    def add(self, tensor):
        self.log.append("sum")
        tensor.mul_(2)


def test_ranks_share_maxima_and_means(attention):
    """A rank that has observed the same batches changes no mean and no maximum below its own."""
    _, program, batches = attention
    alone = observe(program, batches)
    shared = observe(program, batches, ranks=OtherHalf(0.0))
    assert shared.batches == 2 * alone.batches
    for name in ("absmax", "cached", "keys", "key_means"):
        ours, theirs = getattr(shared, name), getattr(alone, name)
        assert all(torch.equal(ours[node], tensor) for node, tensor in theirs.items()), name
    larger = observe(program, batches, ranks=OtherHalf(1e6))
    assert all(bool((t == 1e6).all()) for group in (larger.absmax, larger.cached) for t in group.values())
    assert all(torch.equal(larger.key_means[node], tensor) for node, tensor in alone.key_means.items())
