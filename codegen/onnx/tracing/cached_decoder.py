"""A causal LM as the file has it: the KV cache goes in and comes out as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.lowering.int8_kv_attention import CHUNKED_PREFILL, DECODE_TOKENS
from qcompile.codegen.onnx.tracing.decoder_cache import cache_layers
from qcompile.codegen.onnx.tracing.int8_cache import ChannelScales, close_cache, open_cache
from qcompile.codegen.onnx.tracing.signature import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    ReferenceCall,
    Signature,
    TensorSignature,
    TracedModule,
)
from qcompile.modules.cache_argument import returned_cache, with_cache
from qcompile.modules.kv_constants import Scales


class CachedDecoder(TracedModule):
    """A causal LM whose KV cache is a list of tensors.

    Args:
        model: takes input_ids, attention_mask, a cache and use_cache, as transformers' models do.
        positions: how many tokens it takes at most.

    Attributes:
        cache_shapes: (G, D) of keys and of values, interleaved, layer by layer.
        int8_scales: of an int8 KV cache; None: it is float.
        rounds_cache: whether an int8 cache is rounded; if not, its codes are not integers.
    """

    def __init__(self, model: nn.Module, positions: int) -> None:
        super().__init__()
        self.model, self.positions = model, positions
        self.int8_scales: ChannelScales | None = None
        self.rounds_cache = True
        self.last_logits_only = False
        layers = cache_layers(model)
        self.cache_shapes = [
            (tuple(p.shape[1:2]) + tuple(p.shape[3:])) for layer in layers for p in (layer.keys, layer.values)
        ]
        parts = [f"{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
        self.signature = Signature(
            inputs=[
                TensorSignature("input_ids", {0: BATCH, 1: SEQUENCE}),
                TensorSignature("attention_mask", {0: BATCH, 1: TOTAL}),
                *[TensorSignature(f"past_key_values.{part}", {0: BATCH, 2: PAST}) for part in parts],
            ],
            outputs=[
                TensorSignature("logits", {0: BATCH, 1: SEQUENCE}),
                *[TensorSignature(f"present.{part}", {0: BATCH, 2: TOTAL}) for part in parts],
            ],
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the model.

        Args:
            input_ids: [B, S].
            attention_mask: [B, P + S], 0 at padding.
            past: keys and values [B, G, P, D], interleaved, layer by layer.

        Returns:
            Logits [B, S, V] ([B, 1, V] with `last_logits_only`), and the cache of P + S tokens.
        """
        cache = open_cache(past, self.int8_scales, self.rounds_cache)
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        out = self.model(**with_cache(self.model, tokens, cache), use_cache=True)
        logits = out.logits[:, -1:] if self.last_logits_only else out.logits
        return logits, close_cache(returned_cache(out), self.int8_scales)

    def expand_scales(self, scales: Scales) -> ChannelScales:
        """The scales of a recipe as [G, D] of keys and of values in every layer."""
        shapes = zip(self.cache_shapes[::2], self.cache_shapes[1::2], strict=True)
        return [
            (keys.float().expand(of_keys), values.float().expand(of_values))
            for (keys, values), (of_keys, of_values) in zip(scales.all, shapes, strict=True)
        ]

    def return_last_logits(self) -> None:
        """From now on, return the logits of the last token only."""
        self.last_logits_only = True
        self.signature.outputs[0].axes = {0: BATCH, 1: 1}

    def sample_inputs(self, batch: int = 2, length: int = 3, past: int = 5) -> tuple[Any, ...]:
        """Random inputs of given sizes: ids, mask and cache."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        mask = torch.ones(batch, past + length, dtype=torch.long)
        cache = [torch.randn(batch, h, past, d, generator=generator) for h, d in self.cache_shapes]
        if self.int8_scales is not None:
            cache = [(40 * part).clamp(-128, 127).to(torch.int8) for part in cache]
        return ids, mask, cache

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Batch, new and past tokens are dynamic."""
        dynamic = torch.export.Dim.DYNAMIC
        return (
            {0: dynamic, 1: dynamic},
            {0: dynamic, 1: dynamic},
            [{0: dynamic, 2: dynamic} for _ in self.cache_shapes],
        )

    def flatten(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        """Ids, mask, and the tensors of the cache."""
        return [arguments[0], arguments[1], *arguments[2]]

    def flat_dynamic_shapes(self) -> list[Any]:
        """Of ids, mask, and the tensors of the cache."""
        ids, mask, cache = self.dynamic_shapes()
        return [ids, mask, *cache]

    def reference_calls(self) -> list[ReferenceCall]:
        """Prefill of an empty cache with batch 1 and 2, and continuations of the caches that it returns.

        Several new tokens behind a cache are for batch 1 only: GroupQueryAttention takes no more. More than
        DECODE_TOKENS may run in another kernel, and a long text behind an int8 cache in chunks, the last one shorter.
        """
        calls = [self.call(self.sample_inputs(1, 7, 0)), self.call(self.sample_inputs(2, 4, 0))]
        sizes = [(1, 1), (1, 3), (1, DECODE_TOKENS + 2), (2, 1)]
        if self.int8_scales is not None and self.positions >= 7 + CHUNKED_PREFILL.min_tokens + 3:
            sizes.append((1, CHUNKED_PREFILL.min_tokens + 3))
        for batch, length in sizes:
            (_, mask, _), (_, *cache) = calls[batch - 1]
            ids = self.sample_inputs(batch, length, 0)[0]
            calls.append(self.call((ids, torch.cat([mask, torch.ones_like(ids)], dim=1), cache)))
        return calls
