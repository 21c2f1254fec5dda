"""What a recipe gives to the calls of a module rather than to its weights, planned before the model is changed.

plan = GenerationPlan.fit(model, recipe, ..)    does the model have a cache that the recipe's passes can serve?
run(program, plan.recipe, ..)
plan.finish(report)                             prefix and cache constants from what the passes computed
plan.attach(model)                              hooks and submodules (generation_hooks.py)
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcompile.modules.cache_argument import cache_argument, cache_name, returned_cache, with_cache
from qcompile.modules.generation_hooks import attach
from qcompile.modules.kv_constants import Centers, Prefix, Scales
from qcompile.modules.recurrent_layers import recurrent_layers
from qcompile.passes.kv_cache.intact_kv import IntactKV
from qcompile.passes.kv_cache.quantize_kv import QuantizeKV
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import PassReport, PrefixValues, Report
from qcompile.recipe.rule import RecipeError

C = TypeVar("C", bound=PassConfig)


class DoesNotFit(RecipeError):
    """A cache that a model has no place for: the reason, and apart from it the fix for who requested the cache."""

    def __init__(self, reason: str, fix: str, who: str) -> None:
        super().__init__(f"{who}: {reason}. Fix: {fix}")
        self.reason = reason


@dataclass
class GenerationPlan:
    """The cache and the prefix that calls will get.

    Attributes:
        recipe: what to run: the caller's, without an optional QuantizeKV that cannot work here, and with the model's
            own beginning-of-sequence token where IntactKV names no prefix.
        heads: of the keys and of the values that each layer caches; empty if the recipe needs no cache.
        skipped: the report on a cache that stays float.
        prefix: set by `finish`.
        constants: set by `finish`.
    """

    recipe: Recipe
    heads: list[tuple[int, int]]
    skipped: PassReport | None = None
    prefix: Prefix | None = None
    constants: Centers | Scales | None = None

    @staticmethod
    def fit(
        model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], attentions: int
    ) -> GenerationPlan:
        """Find what each layer caches, by one call with a cache.

        Args:
            model: in evaluation mode.
            recipe: to be run.
            args: of one call of the model, by position.
            kwargs: by name.
            attentions: how many the captured graph has.

        Returns:
            The plan; `recipe` is without a cache that is optional and does not fit.

        Raises:
            RecipeError: the recipe needs a cache and the model takes none, or keeps it empty; static scales for a
                prefix that is to stay float; constants for the graph's attentions, and a cache with other layers.
        """
        cache, prefix = _find(recipe, QuantizeKV), _find(recipe, IntactKV)
        needs_cache = cache or prefix
        if needs_cache is None:
            return GenerationPlan(recipe, [])
        if cache is not None and cache.static and prefix is not None:
            raise RecipeError(
                "IntactKV keeps its tokens float, which a cache with static scales cannot. Fix: drop one of them"
            )
        optional = cache is not None and cache.optional and prefix is None
        try:
            heads = _heads_of_cache(model, args, kwargs, type(needs_cache).__name__, alone=not optional)
            _check_layers(cache, prefix, len(heads), attentions)
            return GenerationPlan(recipe, heads)
        except DoesNotFit as error:
            if not optional:
                raise
            report = PassReport("QuantizeKV")
            report.skip("cache", f"stays float: {error.reason}")
        without = dataclasses.replace(recipe, passes=tuple(c for c in recipe.passes if c is not cache))
        return GenerationPlan(without, [], report)

    def finish(self, report: Report) -> None:
        """Take what the passes computed for each attention; heads repeated for grouped queries are dropped."""
        found = report.constants
        if found.prefix is not None and _find(self.recipe, IntactKV) is not None:
            self.prefix = _prefix_module(found.prefix, self.heads)
        if found.centers:
            pairs = zip(found.centers, self.heads, strict=True)
            self.constants = Centers([_own_heads(mean, of_keys) for mean, (of_keys, _) in pairs])
        elif found.key_scales:
            scales = zip(found.key_scales, found.value_scales, self.heads, strict=True)
            self.constants = Scales([(_own_heads(k, n), _own_heads(v, m)) for k, v, (n, m) in scales])

    def attach(self, model: nn.Module) -> None:
        """Give the model's calls the cache and the prefix."""
        attach(model, self.recipe, self.prefix, self.constants)


def with_own_prefix(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with the model's own beginning-of-sequence token where IntactKV names no prefix."""
    token = getattr(getattr(model, "config", None), "bos_token_id", None)
    if not isinstance(token, int):
        return recipe
    passes = [IntactKV((token,)) if isinstance(c, IntactKV) and not c.prefix else c for c in recipe.passes]
    return dataclasses.replace(recipe, passes=tuple(passes))


def _find(recipe: Recipe, kind: type[C]) -> C | None:
    return next((config for config in recipe.passes if isinstance(config, kind)), None)


def _check_layers(cache: QuantizeKV | None, prefix: IntactKV | None, layers: int, attentions: int) -> None:
    if layers == attentions:
        return
    reason = f"the graph has {attentions} attentions, the cache {layers} layers"
    if prefix is not None:
        raise DoesNotFit(reason, "drop IntactKV", "IntactKV")
    if cache is not None and (cache.static or cache.center):
        raise DoesNotFit(reason, f"use {'center' if cache.center else 'static'}=False", "QuantizeKV")


def _heads_of_cache(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], who: str, *, alone: bool
) -> list[tuple[int, int]]:
    """Of every layer. alone: also of a model that fills a cache and does not hand it on, as encoders do."""
    parameters = inspect.signature(model.forward).parameters
    if cache_argument(model) is not None:
        from qcompile.modules.kv_cache import KVCache

        cache = KVCache(8)
        filled = with_cache(model, kwargs, cache)
        if "use_cache" in parameters:
            filled["use_cache"] = True
        try:
            with torch.no_grad():
                out = model(*args, **filled)
        except Exception as error:  # the model's own, of whatever kind
            reason = _recurrent_states(model, args, with_cache(model, filled, None)) or (
                f"{type(model).__name__} does not run with a cache of keys and values only "
                f"({type(error).__name__}: {error})"
            )
            raise DoesNotFit(reason, f"drop {who}", who) from error
        if cache.get_seq_length() and (alone or returned_cache(out) is not None):
            return cache.heads
    raise DoesNotFit(
        f"{type(model).__name__} puts nothing into {cache_name()}, where keys and values are cached",
        f"drop {who}; torch.compile(model, backend='qcompile') can round them in the graph",
        who,
    )


def _recurrent_states(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a hybrid model caches beside keys and values, as a reason; "" if it caches nothing else."""
    try:
        with torch.no_grad():
            layers = returned_cache(model(*args, **kwargs)).layers
    except Exception:  # it does not run with a cache of its own either
        return ""
    found = recurrent_layers(layers)
    if not found:
        return ""
    kinds = " and ".join(sorted(set(found.values())))
    kind = "is a hybrid" if len(found) < len(layers) else "caches no keys and values"
    return (
        f"{type(model).__name__} {kind}: {len(found)} of its {len(layers)} layers cache the state of a "
        f"convolution or of a recurrence ({kinds}), which no format of a KV cache describes"
    )


def _prefix_module(values: PrefixValues, heads: list[tuple[int, int]]) -> Prefix:
    layers = []
    for keys, own_values, (of_keys, of_values) in zip(values.keys, values.values, heads, strict=True):
        layers.append(
            (keys[:, :: keys.shape[1] // of_keys].clone(), own_values[:, :: own_values.shape[1] // of_values].clone())
        )
    return Prefix(values.ids, layers, values.logits)


def _own_heads(tensor: Tensor, count: int) -> Tensor:
    """[H, D] of all query heads -> [count, D], one for each head that is cached."""
    return tensor[:: max(1, len(tensor) // count)].clone()
