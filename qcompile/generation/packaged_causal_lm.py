"""A causal LM of two compiled graphs, a prompt and a step, with transformers' `generate()` around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qcompile.generation.growing_cache import GrowingLayer, as_growing, obstacle_to_growing
from qcompile.modules.cache_argument import cache_name

Graph = Callable[[list[Tensor]], list[Tensor]]
"""ids, positions, mask, keys and values of each layer -> logits, new keys and values; backend/cached_graph.py."""


class PackagedCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers has no types here
    """A causal LM without modules: its weights are in the graphs.

    `generate()` is transformers' own: sampling, stopping criteria and streamers are as with any model. It reads one
    text at a time, and gives the logits of the last token.
    """

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    main_input_name = "input_ids"

    def __init__(
        self, config: Any, prompt: Graph, step: Graph, cache: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> None:
        """Put the parts together.

        Args:
            config: of the model that was packaged.
            prompt: the graph of any number of tokens.
            step: the graph of one token.
            cache: heads and width of the keys and values of each layer, one after the other.
            dtype: of the cache.
        """
        super().__init__(config)
        self._prompt, self._step, self._parts, self._cache_dtype = prompt, step, tuple(cache), dtype
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._cache_dtype

    def get_input_embeddings(self) -> None:
        """There is no module for them."""

    def get_output_embeddings(self) -> None:
        """Nor for these."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As that of a causal LM of transformers.

        Args:
            input_ids: int64 [1, N].
            attention_mask: 0 at padding, [1, T + N]; None for no padding.
            position_ids: int64 [1, N]; None counts tokens.
            cache: a DynamicCache of T tokens; None for none.
            past_key_values: the same, as transformers calls it before 5.24.
            use_cache: False: return no cache.
            logits_to_keep: 1.
            return_dict: False: a tuple.
            others: nothing that changes the result.

        Returns:
            Logits [1, 1, V] of the last token, and the cache.

        Raises:
            ValueError: what the graphs do not compute: several texts, logits of other tokens, another kind of cache.
        """
        refused = sorted(name for name, value in others.items() if value is not None and value is not False)
        if refused:
            raise ValueError(f"a packaged model takes no {', '.join(refused)}. Fix: drop it, or call the model itself")
        ids = _one_text(input_ids)
        if not isinstance(logits_to_keep, int) or logits_to_keep != 1:
            raise ValueError(
                f"logits_to_keep={logits_to_keep}: a packaged model gives the logits of the last token. Fix: leave it "
                "at 1, without assisted decoding"
            )
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if cache is None else cache
        past, tokens = cache.get_seq_length(), ids.shape[1]
        self._let_grow(cache, past)
        positions = torch.arange(past, past + tokens)[None] if position_ids is None else position_ids
        mask = torch.ones(1, past + tokens) if attention_mask is None else attention_mask
        for name, tensor, size in (("position_ids", positions, tokens), ("attention_mask", mask, past + tokens)):
            if tensor.shape != (1, size):
                raise ValueError(f"{name} is {list(tensor.shape)}, and {tokens} tokens behind {past} need [1, {size}]")
        logits = self._read(ids, positions.long().contiguous(), mask.long().contiguous(), cache, past)
        output = CausalLMOutputWithPast(logits=logits, **{cache_name(): None if use_cache is False else cache})
        return output.to_tuple() if return_dict is False else output

    def _read(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any, past: int) -> Tensor:
        """Run a graph, and write its keys and values into the cache; returns the logits."""
        run, layers, tokens = self._step if ids.shape[1] == 1 else self._prompt, cache.layers, ids.shape[1]
        if not past:
            empty = [torch.zeros(1, heads, 2, width, dtype=self._cache_dtype) for heads, width in self._parts]
            logits, *rows = run([ids, positions, mask, *empty])
            for layer, keys, values in zip(layers, rows[::2], rows[1::2], strict=True):
                layer.update(keys, values)
            return logits
        buffers = [part for layer in layers for part in layer.reserve(tokens)]
        logits, *rows = run([ids, positions, mask, *buffers])
        torch.ops.qcompile_cpu.append_rows(buffers, rows, past)
        for layer in layers:
            layer.advance(tokens)
        return logits

    def _let_grow(self, cache: Any, past: int) -> None:
        """Let the cache hold layers that grow in place. Raises ValueError for another kind of cache."""
        count = len(self._parts) // 2
        obstacle = obstacle_to_growing(cache) if isinstance(cache, DynamicCache) else f"it is a {type(cache).__name__}"
        if obstacle is None and past and len(cache.layers) != count:
            obstacle = f"it has {len(cache.layers)} layers, and the model {count}"
        if obstacle is not None:
            raise ValueError(f"a packaged model cannot read this cache: {obstacle}. Fix: give none, or a DynamicCache")
        if not past:
            cache.layers[:] = [GrowingLayer() for _ in range(count)]
        as_growing(cache)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there are no weights here to save. Raises TypeError."""
        raise TypeError("a packaged model is its file. Fix: copy the .pt2, or save the model that it was made from")


def _one_text(ids: Tensor | None) -> Tensor:
    if ids is None or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        shape = None if ids is None else list(ids.shape)
        raise ValueError(
            f"input_ids is {shape}: a packaged model reads one text, [1, N]. Fix: call generate() for each text, "
            "without beams"
        )
    return ids.long().contiguous()
