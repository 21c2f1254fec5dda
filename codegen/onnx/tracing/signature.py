"""How an exported model is called: what it takes and gives by name, its free sizes, and calls to check it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.codegen.onnx.lowering.int8_kv_attention import LONG
from qcompile.codegen.onnx.lowering.node_builder import FEW
from qcompile.modules.kv_constants import Scales

Check = tuple[tuple[Any, ...], list[Tensor]]  # arguments, and what the module makes of them


def _check(module: nn.Module, arguments: tuple[Any, ...]) -> Check:
    return arguments, torch.utils._pytree.tree_leaves(module(*arguments))


class WithCache(nn.Module):
    """A causal LM whose cache is a list of tensors.

    Attributes:
        positions: how many tokens it takes.
        scales: of keys and of values in every layer, [G, D], where the cache holds int8 codes; else None.
        rounded: whether such a cache is rounded; if not, codes are what they were before.
    """

    def __init__(self, model: nn.Module, positions: int) -> None:
        super().__init__()
        self.model, self.positions = model, positions
        self.scales: list[tuple[Tensor, Tensor]] | None = None
        self.rounded = True
        with torch.no_grad():
            layers = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values.layers
        self.shapes = [
            (tuple(p.shape[1:2]) + tuple(p.shape[3:])) for layer in layers for p in (layer.keys, layer.values)
        ]
        names = [f"{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
        self.input_names = ["input_ids", "attention_mask", *[f"past_key_values.{n}" for n in names]]
        self.output_names = ["logits", *[f"present.{n}" for n in names]]
        batch, past = "batch", "past_sequence"
        self.dimensions = [{0: batch, 1: "sequence"}, {0: batch, 1: "total_sequence"}]
        self.dimensions += [{0: batch, 2: past} for _ in self.shapes]
        self.last = False  # whether only the last token's logits are given
        self.out_dimensions: list[dict[int, Any]] = [{0: batch, 1: "sequence"}] + [
            {0: batch, 2: "total_sequence"} for _ in self.shapes
        ]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the grown cache."""
        from transformers import DynamicCache

        from qcompile.modules.kv_cache import KVCache

        steps = None if self.scales is None else [scale[:, None] for pair in self.scales for scale in pair]
        if steps is not None:
            past = [codes * step for codes, step in zip(past, steps, strict=True)]
        cache = KVCache(8, scales=self.scales) if self.scales is not None and self.rounded else DynamicCache()
        for index in range(len(past) // 2):
            cache.update(past[2 * index], past[2 * index + 1], index)
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1:] if self.last else out.logits
        layers = out.past_key_values.layers
        if isinstance(cache, KVCache):
            return logits, [part.codes.read() for layer in layers for part in (layer.own_keys, layer.own_values)]
        grown = [part for layer in layers for part in (layer.keys, layer.values)]
        return logits, grown if steps is None else [part / step for part, step in zip(grown, steps, strict=True)]

    def for_heads(self, scales: Scales) -> list[tuple[Tensor, Tensor]]:
        """Scales of keys and of values [G, D] in every layer; as `scales`, they make the cache one of codes."""
        shapes = zip(self.shapes[::2], self.shapes[1::2], strict=True)
        return [
            (keys.float().expand(of_keys), values.float().expand(of_values))
            for (keys, values), (of_keys, of_values) in zip(scales.all, shapes, strict=True)
        ]

    def only_last(self) -> None:
        """From now on, give the last token's logits only."""
        self.last = True
        self.out_dimensions[0] = {0: "batch", 1: 1}

    def arguments(self, batch: int = 2, length: int = 3, past: int = 5) -> tuple[Any, ...]:
        """Random inputs of given sizes."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        mask = torch.ones(batch, past + length, dtype=torch.long)
        cache = [torch.randn(batch, h, past, d, generator=generator) for h, d in self.shapes]
        if self.scales is not None:
            cache = [(40 * part).clamp(-128, 127).to(torch.int8) for part in cache]
        return ids, mask, cache

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Batch, length and past are free."""
        free = torch.export.Dim.DYNAMIC
        return {0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free} for _ in self.shapes]

    def checks(self) -> list[Check]:
        """Prefill from nothing, for one and two rows, and continuations of the cache that it leaves.

        Several tokens behind a cache are for one row only: GroupQueryAttention takes no more. More than a few may be
        computed in another way, and many behind a cache of codes in pieces, the last of them shorter.
        """
        found = [_check(self, self.arguments(1, 7, 0)), _check(self, self.arguments(2, 4, 0))]
        sizes = [(1, 1), (1, 3), (1, FEW + 2), (2, 1)]
        if self.scales is not None and self.positions >= 7 + LONG + 3:
            sizes.append((1, LONG + 3))
        for rows, length in sizes:
            (_, mask, _), (_, *cache) = found[rows - 1]
            more = self.arguments(rows, length, 0)[0]
            found.append(_check(self, (more, torch.cat([mask, torch.ones_like(more)], dim=1), cache)))
        return found

    def flat(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        """Arguments in the order of `input_names`."""
        return [arguments[0], arguments[1], *arguments[2]]

    def flat_shapes(self) -> list[Any]:
        """Free sizes in the order of `input_names`."""
        ids, mask, caches = self.dynamic_shapes()
        return [ids, mask, *caches]


class Plain(nn.Module):
    """A module without a cache, called with keyword arguments."""

    rounded = False  # it has no cache

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        self.example = dict(example) if isinstance(example, dict) else {"input": example}
        self.keyword = isinstance(example, dict)
        self.input_names = list(self.example)
        with torch.no_grad():
            found = self._named(*self.example.values())
        self.output_names, outputs = list(found), list(found.values())
        self.dimensions = [{0: "batch", 1: "sequence"} if v.ndim == 2 else {0: "batch"} for v in self.example.values()]
        self.out_dimensions: list[dict[int, Any]] = [{} for _ in outputs]
        self.is_length_free = False

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Every tensor that the module returns."""
        return tuple(self._named(*values).values())

    def _named(self, *values: Tensor) -> dict[str, Tensor]:
        """The module's tensors by its own names for them; `output`, `output_1` .. if it has none."""
        out = self.model(**dict(zip(self.example, values, strict=True))) if self.keyword else self.model(*values)
        if isinstance(out, Mapping):
            return {name: part for name, part in out.items() if isinstance(part, Tensor)}
        parts = [part for part in ((out,) if isinstance(out, Tensor) else out) if isinstance(part, Tensor)]
        return {f"output_{i}" if i else "output": part for i, part in enumerate(parts)}

    def arguments(self) -> tuple[Any, ...]:
        """The example, with two rows."""
        return tuple(torch.cat([v, v]) if v.shape[0] == 1 else v for v in self.example.values())

    def dynamic_shapes(self) -> Any:
        """What torch.export may leave free."""
        auto = torch.export.Dim.AUTO
        return (tuple({d: auto for d in named} for named in self.dimensions),)

    def checks(self) -> list[Check]:
        """The example, its first row, and, if the length of texts was left free, a shorter text."""
        whole = self.arguments()
        found = [_check(self, whole), _check(self, tuple(v[:1] for v in whole))]
        if self.is_length_free:
            found.append(_check(self, tuple(v[:, : max(2, v.shape[1] // 2)] if v.ndim == 2 else v for v in whole)))
        return found

    def note_sizes(self, inputs: list[Any]) -> None:
        """Whether the graph that was traced takes texts of any length; `inputs`: its fake inputs."""
        texts = [value for value in inputs if value.ndim == 2]
        free = all(isinstance(value.shape[1], torch.SymInt) and not value.is_floating_point() for value in texts)
        self.is_length_free = bool(texts) and free

    def flat(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        """Arguments in the order of `input_names`."""
        return list(arguments)

    def flat_shapes(self) -> list[Any]:
        """Free sizes in the order of `input_names`."""
        return list(self.dynamic_shapes()[0])
