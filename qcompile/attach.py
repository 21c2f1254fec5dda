"""What a recipe gives to the calls of a module rather than to its weights.

A quantized key/value cache (QuantizeKV) and the float keys and values of a prefix (IntactKV): a call
without a cache, or with a fresh empty one as `generate` makes it, gets a cache of ours, and a text
that begins with the prefix starts behind it. A cache of the caller's own is left alone.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.passes.intact_kv import IntactKV
from qcompile.passes.quantize_kv import QuantizeKV
from qcompile.recipe import Recipe, RecipeError

PREFIX = "qcompile_prefix"  # the submodule that holds the prefix, so that checkpoints carry it
CENTERS = "qcompile_centers"  # and the one that holds the mean keys

NO_QUANTIZED_CACHE = (
    "QuantizeKV has no form in ONNX: it makes a scale and a zero point for every head of every token as the token "
    "comes, and ONNX Runtime's attention reads 8- and 4-bit caches with fixed scales only (one, or one for each "
    "channel) and without zero points. Export a recipe without QuantizeKV; its cache is float32"
)


class Prefix(nn.Module):
    """Float keys and values [1, H, p, D] of every layer, and logits [1, p, V], of `ids` [p]."""

    ids: Tensor
    logits: Tensor

    def __init__(self, ids: Tensor, layers: list[tuple[Tensor, Tensor]], logits: Tensor) -> None:
        super().__init__()
        self.layers = len(layers)
        self.register_buffer("ids", ids)
        self.register_buffer("logits", logits)
        for index, (keys, values) in enumerate(layers):
            self.register_buffer(f"keys{index}", keys)
            self.register_buffer(f"values{index}", values)

    def starts(self, ids: Tensor) -> bool:
        """Whether every row of ids [B, T] begins with the prefix and goes on."""
        p = len(self.ids)
        return ids.ndim == 2 and ids.shape[1] > p and bool((ids[:, :p] == self.ids).all())

    def caches(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer for a batch."""
        return tuple(
            [getattr(self, f"{part}{i}").expand(rows, -1, -1, -1) for i in range(self.layers)]
            for part in ("keys", "values")
        )

    @staticmethod
    def empty(shapes: Mapping[str, list[int]]) -> Prefix:
        """A prefix of the right shapes, for loading."""
        count = len(shapes) // 2 - 1
        layers = [(torch.empty(shapes[f"keys{i}"]), torch.empty(shapes[f"values{i}"])) for i in range(count)]
        return Prefix(torch.empty(shapes["ids"], dtype=torch.int64), layers, torch.empty(shapes["logits"]))


class Centers(nn.Module):
    """The mean key [H, D] of every layer."""

    def __init__(self, centers: Sequence[Tensor]) -> None:
        super().__init__()
        for index, center in enumerate(centers):
            self.register_buffer(f"center{index}", center)

    @property
    def all(self) -> list[Tensor]:
        """Layer by layer."""
        return [getattr(self, f"center{index}") for index in range(len(self._buffers))]


def resolve(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with the model's own beginning-of-sequence token where IntactKV names no prefix."""
    token = getattr(getattr(model, "config", None), "bos_token_id", None)
    if not isinstance(token, int):
        return recipe
    passes = [IntactKV((token,)) if isinstance(c, IntactKV) and not c.prefix else c for c in recipe.passes]
    return dataclasses.replace(recipe, passes=tuple(passes))


def _of(recipe: Recipe, kind: type) -> Any:
    return next((config for config in recipe.passes if isinstance(config, kind)), None)


def heads_of_cache(
    model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[int, int]]:
    """Heads of the keys and of the values that each layer caches, found by one call with a cache.

    Raises:
        RecipeError: the recipe needs a cache and the model takes none, or leaves it empty.
    """
    wanted = _of(recipe, QuantizeKV) or _of(recipe, IntactKV)
    if wanted is None:
        return []
    if "past_key_values" in inspect.signature(model.forward).parameters:
        from qcompile.kv_cache import KVCache

        cache = KVCache(8)
        with torch.no_grad():
            model(*args, **{**kwargs, "past_key_values": cache})
        if cache.get_seq_length():
            return cache.heads
    name = type(wanted).__name__
    raise RecipeError(
        f"{name}: {type(model).__name__} puts nothing into past_key_values, where keys and values are held. "
        f"Drop {name}; torch.compile(model, backend='qcompile') can round them in the graph"
    )


def make_prefix(recipe: Recipe, tensors: dict[str, Tensor], heads: list[tuple[int, int]]) -> Prefix | None:
    """The prefix from what the pass IntactKV computed; heads repeated for grouped queries are dropped.

    Raises:
        RecipeError: the attentions of the graph are not the layers of the cache.
    """
    how = _of(recipe, IntactKV)
    if how is None:
        return None
    count = sum(name.endswith(".keys") for name in tensors)
    if count != len(heads):
        raise RecipeError(f"IntactKV: the graph has {count} attentions, the cache {len(heads)} layers: drop IntactKV")
    layers = []
    for index, (of_keys, of_values) in enumerate(heads):
        keys, values = tensors[f"{index}.keys"], tensors[f"{index}.values"]
        layers.append(
            (keys[:, :: keys.shape[1] // of_keys].clone(), values[:, :: values.shape[1] // of_values].clone())
        )
    return Prefix(torch.tensor(how.prefix), layers, tensors["logits"])


def make_centers(tensors: dict[str, Tensor], heads: list[tuple[int, int]]) -> Centers | None:
    """The mean keys from what the pass QuantizeKV gathered; of repeated heads one each.

    Raises:
        RecipeError: the attentions of the graph are not the layers of the cache.
    """
    found = [tensor for name, tensor in tensors.items() if name.endswith(".center")]
    if not found:
        return None
    if len(found) != len(heads):
        raise RecipeError(
            f"QuantizeKV: the graph has {len(found)} attentions, the cache {len(heads)} layers: use center=False"
        )
    return Centers([c[:: max(1, len(c) // n)].clone() for c, (n, _) in zip(found, heads, strict=True)])


def attach(model: nn.Module, recipe: Recipe, prefix: Prefix | None = None, centers: Centers | None = None) -> None:
    """Give a model's calls the cache and the prefix of a recipe; nothing if it has neither."""
    cache_of = _of(recipe, QuantizeKV)
    if cache_of is None and prefix is None:
        return
    for name, held in ((PREFIX, prefix), (CENTERS, centers)):
        if held is not None:
            model.add_module(name, held)
    calls = _Calls(cache_of, prefix, centers)
    model.qcompile_calls = calls
    model.register_forward_pre_hook(calls.before, with_kwargs=True)
    model.register_forward_hook(calls.after, with_kwargs=True)


def refuse_quantized_cache(model: nn.Module, recipe: Recipe | None) -> None:
    """Raise RecipeError if a model, or a recipe for it, quantizes its cache: asked before an export's long work."""
    calls = getattr(model, "qcompile_calls", None)
    if (recipe is not None and _of(recipe, QuantizeKV)) or (calls is not None and calls.how is not None):
        raise RecipeError(NO_QUANTIZED_CACHE)


@contextmanager
def detached(model: nn.Module) -> Iterator[Prefix | None]:
    """Calls of the model without its cache and prefix, as an exporter needs them; gives the prefix.

    Raises:
        RecipeError: the model quantizes its cache, which an exported graph cannot.
    """
    refuse_quantized_cache(model, None)
    calls = getattr(model, "qcompile_calls", None)
    if calls is None:
        yield None
        return
    calls.enabled = False
    try:
        yield calls.prefix
    finally:
        calls.enabled = True


class _Calls:
    """The hooks of one model."""

    enabled = True

    def __init__(self, how: QuantizeKV | None, prefix: Prefix | None, centers: Centers | None) -> None:
        self.how, self.prefix, self.centers = how, prefix, centers
        self.skipped = 0  # tokens of the call in progress that come from the prefix

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the call a cache, and start it behind the prefix."""
        from transformers.cache_utils import DynamicCache

        from qcompile.kv_cache import KVCache

        self.skipped = 0
        if not self.enabled:
            return args, kwargs
        cache = kwargs.get("past_key_values")
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            return args, kwargs
        ids = args[0] if args else kwargs.get("input_ids")
        starts = self.prefix is not None and isinstance(ids, Tensor) and self.prefix.starts(ids)
        if self.how is None and not starts:
            return args, kwargs
        own: Any = DynamicCache()
        if self.how is not None:
            means = None if self.centers is None else self.centers.all
            own = KVCache(self.how.bits, hadamard=self.how.hadamard, intact=self.how.intact, centers=means)
        kwargs = {**kwargs, "past_key_values": own}
        if starts:
            assert self.prefix is not None and isinstance(ids, Tensor)
            p = self.skipped = len(self.prefix.ids)
            for index, (keys, values) in enumerate(zip(*self.prefix.caches(len(ids)), strict=True)):
                if self.how is not None:
                    own.intact = max(own.intact, p)
                own.update(keys, values, index)
            for name in ("position_ids", "cache_position", "token_type_ids"):
                if isinstance(kwargs.get(name), Tensor):
                    kwargs[name] = kwargs[name][..., p:]
            if args:
                args = (ids[:, p:], *args[1:])
            else:
                kwargs["input_ids"] = ids[:, p:]
        return args, kwargs

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Put the prefix's logits before those of the rest, where all were asked for."""
        skipped, self.skipped = self.skipped, 0
        ids = args[0] if args else kwargs.get("input_ids")
        logits = getattr(out, "logits", None)
        if skipped and isinstance(logits, Tensor) and isinstance(ids, Tensor) and logits.shape[1] == ids.shape[1]:
            assert self.prefix is not None
            first = self.prefix.logits.to(logits.dtype).expand(logits.shape[0], -1, -1)
            out.logits = torch.cat([first, logits], 1)
        return out
