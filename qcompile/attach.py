"""What a recipe gives to the calls of a module rather than to its weights: a quantized key/value cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from qcompile.passes.quantize_kv import QuantizeKV
from qcompile.recipe import Recipe, RecipeError


def _cache_config(recipe: Recipe) -> QuantizeKV | None:
    return next((config for config in recipe.passes if isinstance(config, QuantizeKV)), None)


def check_attachable(model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a recipe whose cache the model has no place for, found by calling it with one.

    Raises:
        RecipeError: the model takes no cache, or leaves it empty.
    """
    if _cache_config(recipe) is None:
        return
    if "past_key_values" in inspect.signature(model.forward).parameters:
        from qcompile.kv_cache import KVCache

        cache = KVCache()
        with torch.no_grad():
            model(*args, **{**kwargs, "past_key_values": cache})
        if cache.get_seq_length():
            return
    raise RecipeError(
        f"QuantizeKV: {type(model).__name__} puts nothing into past_key_values, where quantized keys and values would "
        "be held. Drop QuantizeKV; torch.compile(model, backend='qcompile') can round them in the graph"
    )


def attach(model: nn.Module, recipe: Recipe) -> None:
    """Make a model quantize its keys and values wherever it is called without a cache of the caller's.

    A call without a cache, or with a fresh empty one as `generate` makes it, gets a `KVCache`.
    """
    how = _cache_config(recipe)
    if how is None:
        return
    from transformers.cache_utils import DynamicCache

    from qcompile.kv_cache import KVCache

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0):
            kwargs = {**kwargs, "past_key_values": KVCache(how.bits, hadamard=how.hadamard, intact=how.intact)}
        return args, kwargs

    model.register_forward_pre_hook(give, with_kwargs=True)
