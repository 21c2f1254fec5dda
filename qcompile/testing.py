"""Property tests for rewrites: random models, and the check that a rewrite computes the same.

    from hypothesis import given
    from qcompile.testing import assert_equivalent, decoders

    @given(decoders())
    def test_my_pass(model):
        before = capture(model, (model.example(),)).widened()
        after = before.copy()
        my_pass(after)
        assert_equivalent(before, after, [model.example()])

The models are small, random and awkward on purpose: gains far from one, biases everywhere, grouped
key/value heads, tied embeddings, gates, residuals, planted outliers. A wrong law fails on them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompile.ir.program import Program
from qcompile.recipe.certificate import first_difference, relative_error, widen

__all__ = ["Decoder", "Shape", "assert_equivalent", "decoders", "mlps", "shapes", "weights"]


@dataclass(frozen=True)
class Shape:
    """The architecture of a random decoder.

    Attributes:
        width: the hidden size.
        heads: query heads.
        kv_heads: key/value heads, which divide the query heads.
        head: the head size.
        inner: the size of the MLP.
        layers: blocks.
        norm: RMSNorm, RMSNorm with a gain of 1 + weight, or LayerNorm.
        gated: whether the MLP has a gate.
        bias: whether linears have biases.
        tied: whether the head shares the embedding's weight.
        post_norm: whether the attention's output is normalized too.
        seed: of the weights and of the example.
        vocabulary: tokens.
        rotary: pairs of channels of the rotary position embedding, or none.
        qk_norm: whether queries and keys are normalized.
    """

    width: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    layers: int
    norm: Literal["rms", "one_plus", "layer"]
    gated: bool
    bias: bool
    tied: bool
    post_norm: bool
    seed: int
    vocabulary: int = 31
    rotary: Literal["none", "half", "interleaved"] = "none"
    qk_norm: bool = False


class RMSNorm(nn.Module):
    """x / rms(x) * g in elementary operations; with one_plus the gain is 1 + weight."""

    def __init__(self, width: int, one_plus: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.one_plus = one_plus

    def forward(self, x: Tensor) -> Tensor:
        """[.., n] -> [.., n]."""
        y: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        gain: Tensor = 1.0 + self.weight if self.one_plus else self.weight
        return gain * y


def rotary(x: Tensor, pairs: str) -> Tensor:
    """A rotary position embedding of x [B, H, S, D] over channels (i, i + D/2) ("half") or (2i, 2i + 1)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3 ** torch.arange(half, dtype=x.dtype)
    if pairs == "half":
        cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)
    return rotated.flatten(-2)


class _Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.attention_norm, self.mlp_norm = _norm(s), _norm(s)
        self.query = nn.Linear(s.width, s.heads * s.head, bias=s.bias)
        self.key = nn.Linear(s.width, s.kv_heads * s.head, bias=s.bias)
        self.value = nn.Linear(s.width, s.kv_heads * s.head, bias=s.bias)
        self.out = nn.Linear(s.heads * s.head, s.width, bias=s.bias)
        self.up = nn.Linear(s.width, s.inner, bias=s.bias)
        self.gate = nn.Linear(s.width, s.inner, bias=s.bias) if s.gated else None
        self.down = nn.Linear(s.inner, s.width, bias=s.bias)
        self.post_norm = _norm(s) if s.post_norm else None
        self.query_norm, self.key_norm = (RMSNorm(s.head, False) if s.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        s, (b, t, _) = self.s, x.shape
        y = self.attention_norm(x)

        def split(z: Tensor, heads: int) -> Tensor:
            return z.view(b, t, heads, s.head).transpose(1, 2)

        q, k, v = split(self.query(y), s.heads), split(self.key(y), s.kv_heads), split(self.value(y), s.kv_heads)
        q, k = self.query_norm(q), self.key_norm(k)
        if s.rotary != "none":
            q, k = rotary(q, s.rotary), rotary(k, s.rotary)
        k, v = (z.repeat_interleave(s.heads // s.kv_heads, dim=1) for z in (k, v))
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = self.out(z.transpose(1, 2).reshape(b, t, -1))
        x = x + (self.post_norm(z) if self.post_norm is not None else z)
        y = self.mlp_norm(x)
        z = self.up(y)
        z = torch.nn.functional.silu(self.gate(y)) * z if self.gate is not None else torch.relu(z)
        out: Tensor = x + self.down(z)
        return out


class Decoder(nn.Module):
    """A small decoder-only transformer with everything that a rewrite may trip over."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        blocks = [_Block(shape) for _ in range(shape.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = _norm(shape)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        generator = torch.Generator().manual_seed(shape.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                fan = parameter.shape[-1] if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan**-0.5)
                if parameter.ndim == 1:
                    parameter.add_(0.7)
            blocks[0].attention_norm.get_parameter("weight")[0] *= 50  # an outlier channel
        if shape.tied:
            self.head.weight = self.embedding.weight
        self.requires_grad_(False).eval()

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S] -> logits [B, S, V]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.final_norm(x))
        return out

    def example(self, batch: int = 2, length: int = 5) -> Tensor:
        """Random token ids [batch, length]."""
        generator = torch.Generator().manual_seed(self.shape.seed + 1)
        return torch.randint(0, self.shape.vocabulary, (batch, length), generator=generator)


def _norm(s: Shape) -> nn.Module:
    return nn.LayerNorm(s.width) if s.norm == "layer" else RMSNorm(s.width, s.norm == "one_plus")


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Random shapes: grouped heads, sizes with and without Hadamard matrices, every norm."""
    kv_heads = draw(st.integers(1, 2))
    head = draw(st.sampled_from([4, 6, 8]))
    return Shape(
        width=draw(st.sampled_from([8, 12, 20, 22])),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head=head,
        inner=draw(st.sampled_from([12, 16, 24])),
        layers=draw(st.integers(1, 2)),
        norm=draw(st.sampled_from(["rms", "one_plus", "layer"])),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        post_norm=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        rotary=draw(st.sampled_from(["none", "half", "interleaved"])),
    )


def decoders() -> st.SearchStrategy[Decoder]:
    """Random small decoders."""
    return shapes().map(Decoder)


@st.composite
def mlps(draw: st.DrawFn) -> nn.Sequential:
    """Random stacks of linears and ReLUs."""
    sizes = draw(st.lists(st.sampled_from([4, 7, 12, 16]), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layers: list[nn.Module] = []
    for k, n in zip(sizes, sizes[1:], strict=False):
        linear = nn.Linear(k, n, bias=draw(st.booleans()))
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False).eval()


@st.composite
def weights(draw: st.DrawFn, rows: int = 6, columns: int = 80) -> Tensor:
    """Random matrices [N, K], some with outliers, zero rows, or one sign only."""
    n, k = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    w: Tensor = torch.randn(n, k, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    if draw(st.booleans()):
        w[0, draw(st.integers(0, k - 1))] *= 100
    if draw(st.booleans()):
        w[-1] = 0
    return w.abs() if draw(st.booleans()) else w


def assert_equivalent(
    before: Program | nn.Module,
    after: Program | nn.Module,
    inputs: Sequence[Any],
    *,
    tolerance: float = 1e-9,
    changed: Collection[str] = (),
) -> None:
    """Assert that two programs (or modules) compute the same, relative to the largest output.

    Args:
        before: a Program, which is run in float64, or a module, which is run in its own dtype.
        after: what a rewrite made of it.
        inputs: flat inputs.
        tolerance: of max|after - before| / max|before|.
        changed: names of nodes that were changed on purpose.

    Raises:
        AssertionError: with the error and, for programs, the first node that differs.
    """
    if isinstance(before, Program) and isinstance(after, Program):
        inputs_64 = widen(inputs, torch.float64)
        error = relative_error(after.widened()(*inputs_64), before.widened()(*inputs_64))
        if error > tolerance:
            node = first_difference(before, after, inputs_64, set(changed))
            raise AssertionError(f"the programs differ by {error:.2e} (allowed {tolerance:.0e}), first at node {node}")
        return
    with torch.no_grad():
        reference, outputs = before(*inputs), after(*inputs)
    flatten = torch.utils._pytree.tree_leaves
    error = relative_error(flatten(outputs), flatten(reference))
    if error > tolerance:
        raise AssertionError(f"the outputs differ by {error:.2e} (allowed {tolerance:.0e})")
