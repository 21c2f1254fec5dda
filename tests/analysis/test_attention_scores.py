"""Rows of queries and keys that meet in scores: through which operators, and where the flow stops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from zoo import build, example

from qcompile.analysis.attention_scores import AttentionScores, attention_matmuls, mixed_channels, scores
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture
from qcompile.testing import rotary

HEADS, D = 4, 4


class Attention(nn.Module):
    """Queries, keys and values of 16 rows; `attend` takes them as [B, H, S, D], `on_heads` is between."""

    def __init__(self, attend, on_heads=lambda x: x, split=lambda x: x.view(*x.shape[:2], -1, D), kv_heads=HEADS):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, kv_heads * D), nn.Linear(16, kv_heads * D)
        self.attend, self.on_heads, self.split = attend, on_heads, split

    def forward(self, x):
        q, k, v = (self.split(f(x)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.attend(self.on_heads(q), self.on_heads(k), v)


def decomposed(between, transpose=lambda k: k.transpose(-1, -2)):
    def attend(q, k, v):
        return between(torch.softmax((q @ transpose(k)).float() / 2, -1), q) @ v

    return attend


def captured(model, dtype=torch.float32):
    return capture(model.to(dtype), (torch.randn(2, 3, 16, dtype=dtype),), dynamic=False)


def only_scores(program):
    (found,) = scores(program, find_sites(program))
    return found


@pytest.mark.parametrize(
    "between",
    [
        lambda p, q: p.to(q.dtype),
        lambda p, q: p.type_as(q),
        lambda p, q: p.to(q.device, q.dtype),
        lambda p, q: p.to(q),
        lambda p, q: p.to(q.dtype).reshape(2, HEADS, 3, 3),
        lambda p, q: p.to(q.dtype).flatten(0, 1).unflatten(0, (2, HEADS)),
        lambda p, q: (p.to(q.dtype) * 1.5).unsqueeze(0).squeeze(0),
    ],
)
def test_softmax_and_what_stands_behind_it(between):
    program = captured(Attention(decomposed(between)), torch.bfloat16)
    (product,) = attention_matmuls(program)
    assert product.keys_transposed and product.values.meta["val"].shape == (2, HEADS, 3, D)
    assert product.value_product in program.outputs or product.value_product.target is torch.ops.aten.matmul.default
    assert isinstance(only_scores(program), AttentionScores)


def test_keys_transposed_in_another_spelling():
    found = only_scores(captured(Attention(decomposed(lambda p, q: p, lambda k: k.mT))))
    assert torch.equal(found.of_key, found.classes[16:].view(HEADS, D))


def test_products_without_a_softmax_are_no_attention():
    program = captured(Attention(lambda q, k, v: torch.relu(q @ k.transpose(-1, -2)) @ v))
    assert not attention_matmuls(program)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: torch.softmax(q @ k.mT, -1).transpose(-1, -2) @ v,  # rows of the probabilities meet no values
        lambda q, k, v: torch.softmax(k @ q.mT, -2).mT @ v,  # keys and queries change places
        lambda q, k, v: v.mT @ torch.softmax(q @ k.mT, -1),  # the values stand on the left
        lambda q, k, v: (lambda p: (p @ v, p))(torch.softmax(q @ k.mT, -1)),
        lambda q, k, v: torch.softmax(q @ k.mT, -1).sin() @ v,
        lambda q, k, v: (q @ k.mT / 2) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT, -1) * v.sum(),
    ],
)
def test_other_products_around_a_softmax_are_no_attention(attend):
    assert not attention_matmuls(captured(Attention(attend)))


def test_scores_with_a_cap_and_a_mask():
    def attend(q, k, v):
        s = 5 * torch.tanh(q @ k.transpose(-1, -2) / 5) + torch.zeros(3, 3)
        s = torch.where(torch.ones(3, 3, dtype=torch.bool).tril(), s.masked_fill(torch.zeros(3, 3) > 0, -9.0), -1e4)
        s = torch.where(torch.ones(3, 3) > 0, s, torch.full((3, 3), -1e4))
        return torch.dropout(torch.softmax(s, -1), 0.5, False) @ v

    (product,) = attention_matmuls(captured(Attention(attend)))
    assert product.queries.meta["val"].shape == (2, HEADS, 3, D) and product.keys.meta["val"].shape == (2, HEADS, D, 3)


@pytest.mark.parametrize("split", [lambda x: x.view(*x.shape[:2], -1, D), lambda x: x.unflatten(-1, (-1, D)),
                                   lambda x: x.reshape(*x.shape[:2], -1, D)])  # fmt: skip
def test_each_row_of_the_queries_meets_its_row_of_the_keys(split):
    program = captured(Attention(scaled_dot_product_attention, split=split))
    found = only_scores(program)
    assert [site.name for site, _ in found.producers] == ["query.weight", "key.weight"]
    assert found.query.tolist() == [True] * 16 + [False] * 16
    assert torch.equal(found.classes[:16], found.classes[16:]) and len(found.classes.unique()) == 16
    assert torch.equal(found.of_key, found.classes[16:].view(HEADS, D))


@pytest.mark.parametrize("pairs,partner", [("half", [2, 3, 0, 1]), ("interleaved", [1, 0, 3, 2])])
def test_a_rotary_embedding_joins_a_channel_and_its_partner(pairs, partner):
    program = captured(Attention(scaled_dot_product_attention, lambda x: rotary(x, pairs)))
    found = only_scores(program)
    assert torch.equal(found.of_key, found.of_key[:, partner]) and len(found.of_key.unique()) == 8
    (product,) = attention_matmuls(program)
    mixed = mixed_channels(program, product)
    assert torch.equal(mixed, mixed[:, partner]) and len(mixed.unique()) == 8


def test_grouped_queries_share_a_key():
    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    found = only_scores(captured(Attention(attend, kv_heads=2)))
    assert found.of_key.shape == (2, D)
    queries = found.classes[:16].view(2, 2, D)
    assert torch.equal(queries[:, 0], queries[:, 1]) and torch.equal(queries[:, 0], found.of_key)


def test_queries_keys_and_values_of_a_fused_attention():
    program = captured(Attention(lambda q, k, v: scaled_dot_product_attention(q * 1.5, k / 2, v.relu())))
    (product,) = attention_matmuls(program)
    targets = [node.target for node in (product.queries, product.keys, product.values)]
    assert targets == [torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten.relu.default]


def test_halves_of_the_channels_from_sums():
    """Half of the channels are a sum of two rows, the others one row each; the linears' last rows are no partners."""
    half = D // 2
    program = captured(
        Attention(scaled_dot_product_attention, lambda x: torch.cat([x[..., :half] + x[..., half:], x[..., half:]], -1))
    )
    found = only_scores(program)
    assert torch.equal(found.of_key, found.of_key[:, [2, 3, 0, 1]]) and len(found.of_key.unique()) == 2 * HEADS

    model = Attention(scaled_dot_product_attention, split=lambda x: x[..., :16].view(*x.shape[:2], -1, D))
    model.on_heads = lambda x: torch.cat([x[..., :half] + x[..., half:], x[..., half:]], -1)
    model.key = nn.Linear(16, 20)  # whose last rows take no part
    found = only_scores(captured(model))
    assert found.classes[32:].tolist() == [-1] * 4 and len(found.of_key.unique()) == 2 * HEADS


def test_rows_that_meet_through_a_third_are_one_class():
    def on_heads(x):
        a, b, c, d = x.split(1, -1)
        return torch.cat([a + b, c + b, b, d], -1)

    found = only_scores(captured(Attention(scaled_dot_product_attention, on_heads)))
    assert [len(head.unique()) for head in found.of_key] == [2] * HEADS and len(found.of_key.unique()) == 2 * HEADS


def test_a_rotation_of_transposed_keys():
    program = captured(Attention(decomposed(lambda p, q: p), lambda x: rotary(x, "half")))
    (product,) = attention_matmuls(program)
    mixed = mixed_channels(program, product)
    assert mixed.shape == (HEADS, D) and torch.equal(mixed, mixed[:, [2, 3, 0, 1]])


def test_queries_share_the_one_key_that_all_heads_read():
    found = only_scores(captured(Attention(decomposed(lambda p, q: p), kv_heads=1)))
    queries = found.classes[:16].view(HEADS, D)
    assert found.of_key.shape == (1, D) and bool((queries == found.of_key).all())
    assert found.classes[16:].tolist() == found.of_key[0].tolist()


def test_one_query_for_several_keys_is_refused():
    class Reversed(Attention):
        def __init__(self):
            super().__init__(decomposed(lambda p, q: p))
            self.query = nn.Linear(16, D)

    found = only_scores(captured(Reversed()))
    assert isinstance(found, Obstacle) and "different heads" in found.reason


def test_one_head_without_an_axis_of_heads():
    class Single(Attention):
        def forward(self, x):
            return self.attend(self.query(x), self.key(x), self.value(x))

    found = only_scores(captured(Single(scaled_dot_product_attention)))
    assert torch.equal(found.of_key, found.classes[16:][None]) and torch.equal(found.classes[:16], found.classes[16:])


class Fused(nn.Module):
    """One linear of queries, keys and values."""

    def __init__(self, function=scaled_dot_product_attention):
        super().__init__()
        self.qkv, self.function = nn.Linear(16, 48), function

    def forward(self, x):
        parts = self.qkv(x).chunk(3, -1)
        return self.function(*(part.view(2, 3, HEADS, D).transpose(1, 2) for part in parts))


def test_rows_of_values_take_no_part():
    program = captured(Fused())
    found = only_scores(program)
    assert found.classes[32:].tolist() == [-1] * 16 and torch.equal(found.classes[:16], found.classes[16:32])
    assert found.query.tolist() == [True] * 16 + [False] * 32
    assert found.producers[0][0].node.name in found.between


@pytest.mark.parametrize(
    "function,reason",
    [
        (lambda q, k, v: scaled_dot_product_attention(q, q, v), "both queries and keys"),
        (lambda q, k, v: scaled_dot_product_attention(q * q, k, v), "not linear"),
        (lambda q, k, v: scaled_dot_product_attention(q + 1.0, k, v), "not linear"),
        (lambda q, k, v: (scaled_dot_product_attention(q, k, v), k), "read on another path"),
        (lambda q, k, v: torch.softmax(q.mT @ k, -1) @ v.mT, "position"),  # an attention over channels
    ],
)
def test_rows_that_cannot_be_scaled_are_refused(function, reason):
    found = only_scores(captured(Fused(function)))
    assert isinstance(found, Obstacle) and reason in found.reason, found


def test_a_shared_projection_is_refused():
    model = Attention(scaled_dot_product_attention)
    model.value = model.key
    found = only_scores(captured(model))
    assert isinstance(found, Obstacle) and "is shared" in found.reason
    model.value, model.other = nn.Linear(16, 16), nn.Linear(16, 16)
    model.value.bias = model.key.bias
    found = only_scores(captured(model))
    assert isinstance(found, Obstacle) and "is shared" in found.reason


def test_what_a_rotation_mixed_is_lost_behind_a_norm():
    class Normed(nn.Module):
        def __init__(self, pairs):
            super().__init__()
            self.norm, self.pairs = nn.LayerNorm(D), pairs

        def forward(self, x):
            return self.norm(rotary(x, self.pairs)) * 2.0 if self.pairs else rotary(self.norm(x), "half")

    for pairs in ("half", "interleaved", ""):
        program = captured(Attention(scaled_dot_product_attention, Normed(pairs)))
        (product,) = attention_matmuls(program)
        mixed = mixed_channels(program, product)
        assert isinstance(mixed, Obstacle) if pairs else torch.equal(mixed, mixed[:, [2, 3, 0, 1]])


def test_a_norm_of_queries_stops_the_flow():
    model = Attention(scaled_dot_product_attention, nn.LayerNorm(D))
    found = only_scores(captured(model))
    assert isinstance(found, Obstacle) and "not linear in each channel" in found.reason
    # Behind a norm other channels begin: they are numbered from there, and nothing mixes them.
    program = captured(model)
    (product,) = attention_matmuls(program)
    assert len(mixed_channels(program, product).unique()) == D * HEADS or mixed_channels(program, product).ndim == 2


def test_keys_that_are_read_elsewhere_are_refused():
    class Leaky(Attention):
        def forward(self, x):
            return super().forward(x), torch.sin(self.split(self.key(x)))

    class Shared(Attention):
        def forward(self, x):
            k = self.key(x)
            q, v = (self.split(f(x)).transpose(1, 2) for f in (self.query, self.value))
            return self.attend(q, self.split(k).transpose(1, 2), v), torch.sin(k)

    assert isinstance(only_scores(captured(Leaky(scaled_dot_product_attention))), Obstacle)
    found = only_scores(captured(Shared(scaled_dot_product_attention)))
    assert isinstance(found, Obstacle) and "read on another path" in found.reason


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert", "phi3", "falcon"])
def test_every_attention_of_the_zoo_is_found(name):
    program = capture(build(name), (), example(name))
    found = attention_matmuls(program)
    assert len(found) == 2
    for product in found:
        heads = product.values.meta["val"].shape[-3]
        assert product.keys.meta["val"].ndim == product.values.meta["val"].ndim and heads
