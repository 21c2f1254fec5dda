"""A small causal decoder that reads an attention mask, and the same texts with and without padding."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from qcompile.ir.capture import capture

LAYOUTS = ("batch first", "tokens first", "flat", "folded heads", "decomposed")


class MaskedDecoder(nn.Module):
    """One layer without positions: a text's values do not depend on what is padded in front of it or behind it.

    Attributes:
        layout: how values lie, of LAYOUTS.
        blind: sees padding too; the mask is read for nothing but its shape.
    """

    def __init__(self, layout="batch first", width=16, heads=2, vocab=32):
        super().__init__()
        self.layout, self.heads = layout, heads
        self.table = nn.Embedding(vocab, width)
        self.norm, self.last = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def attend(self, x, mask):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = torch.ones(t, t, dtype=torch.bool).tril() & (mask[:, None, None, :] == 1)
        if self.layout == "decomposed":
            y = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~seen, -1e4), -1) @ v
        elif self.layout == "folded heads":
            q, k, v = (f.reshape(b * self.heads, t, -1) for f in (q, k, v))
            added = torch.zeros(b, 1, t, t).masked_fill(~seen, -1e4).expand(-1, self.heads, -1, -1)
            y = scaled_dot_product_attention(q, k, v, attn_mask=added.reshape(b * self.heads, t, t))
            y = y.view(b, self.heads, t, -1)
        else:
            y = scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(b, 1, t, t).masked_fill(~seen, -1e4))
        return self.out(y.transpose(1, 2).reshape(b, t, -1))

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        x = x + self.attend(self.norm(x), attention_mask)
        b, t, k = x.shape
        y = self.last(x)
        y = y.transpose(0, 1) if self.layout == "tokens first" else y.view(-1, k) if self.layout == "flat" else y
        y = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        y = y.transpose(0, 1) if self.layout == "tokens first" else y.view(b, t, k) if self.layout == "flat" else y
        return self.head(x + y)


@cache
def decoder(layout="batch first", seed=0):
    """A decoder whose padding token 0 has far larger activations than any text, and its program, to be copied."""
    torch.manual_seed(seed)
    model = MaskedDecoder(layout).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3) if parameter.ndim == 2 else parameter.add_(torch.randn_like(parameter) * 0.3)
    model.table.weight[0] = 0
    model.table.weight[0, ::5] = 40.0
    ids = torch.randint(1, 32, (2, 7))
    return model, capture(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def texts(lengths, seed=0):
    """Token ids [1, n] of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 32, (1, n), generator=generator) for n in lengths]


def unpadded(rows) -> list[list[Tensor]]:
    """Each text as a batch of its own."""
    return [[row, torch.ones_like(row)] for row in rows]


def padded(rows, *, left=False, extra=0) -> list[Tensor]:
    """All texts as one batch, padded by the token 0 to the longest and `extra` beyond."""
    width = max(row.shape[1] for row in rows) + extra

    def widened(row):
        gap = width - row.shape[1]
        return pad(row, (gap, 0) if left else (0, gap))

    return [torch.cat([widened(r) for r in rows]), torch.cat([widened(torch.ones_like(r)) for r in rows])]
