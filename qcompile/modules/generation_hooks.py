"""Hooks that give a module's calls a quantized key/value cache and the float keys and values of a prefix.

A call without a cache, or with a fresh empty one as `generate` makes it, gets a cache of ours (QuantizeKV), and a text
that begins with the prefix (IntactKV) starts behind it. A cache of the caller's own is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.modules.cache_argument import given_cache, with_cache
from qcompile.modules.kv_constants import CENTERS, PREFIX, SCALES, Centers, Prefix, Scales
from qcompile.passes.kv_cache.quantize_kv import QuantizeKV
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError

_NO_ONNX_FORM = (
    "this QuantizeKV has no form in ONNX: it makes a scale and a zero point for every head of every token as the token "
    "comes, and ONNX Runtime's attention reads caches with static scales only (one, or one for each channel) and "
    "without zero points. Fix: use QuantizeKV(8, static=True), or drop it: the cache is float32 then"
)


class GenerationHooks:
    """The hooks of one model, and what they give to its calls.

    Attributes:
        config: of the quantized cache; None: calls keep their float cache.
        prefix: keys, values and logits of the prefix; None: there is none.
        centers: mean keys of the cache; None: not centered.
        scales: static scales of the cache; None: dynamic.
        enabled: False while an exporter traces the model.
    """

    def __init__(
        self, config: QuantizeKV | None, prefix: Prefix | None = None, constants: Centers | Scales | None = None
    ) -> None:
        self.config, self.prefix = config, prefix
        self.centers = constants if isinstance(constants, Centers) else None
        self.scales = constants if isinstance(constants, Scales) else None
        self.enabled = True

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the call a cache, and start it behind the prefix."""
        from transformers.cache_utils import DynamicCache

        if not self.enabled:
            return args, kwargs
        cache = given_cache(kwargs)
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            return args, kwargs
        ids = args[0] if args else kwargs.get("input_ids")
        if self.prefix is not None and isinstance(ids, Tensor) and self.prefix.starts(ids):
            return self._behind_prefix(model, self.prefix, ids, args, kwargs)
        return (args, with_cache(model, kwargs, self._cache())) if self.config is not None else (args, kwargs)

    def _behind_prefix(
        self, model: nn.Module, prefix: Prefix, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        p = len(prefix.ids)
        cache = self._cache()
        cache.qcompile_from_prefix = p  # state of this call alone: several threads may call the model
        for index, (keys, values) in enumerate(zip(*prefix.caches(len(ids)), strict=True)):
            if self.config is not None:
                cache.sink_tokens = max(cache.sink_tokens, p)
            cache.update(keys, values, index)
        kwargs = with_cache(model, kwargs, cache)
        for name in ("position_ids", "cache_position", "token_type_ids"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = kwargs[name][..., p:]
        if args:
            return (ids[:, p:], *args[1:]), kwargs
        return args, {**kwargs, "input_ids": ids[:, p:]}

    def _cache(self) -> Any:
        from transformers.cache_utils import DynamicCache

        from qcompile.modules.kv_cache import KVCache

        if self.config is None:
            return DynamicCache()
        return KVCache(
            self.config.bits,
            hadamard=self.config.hadamard,
            sink_tokens=self.config.sink_tokens,
            centers=None if self.centers is None else self.centers.all,
            scales=None if self.scales is None else self.scales.all,
            fp8=bool(self.config.fp8),
        )

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Put the prefix's logits before those of the rest, where all were requested."""
        cache = given_cache(kwargs)  # as the model was called, so one of another call has no such attribute
        from_prefix = getattr(cache, "qcompile_from_prefix", 0)
        if cache is not None and from_prefix:
            cache.qcompile_from_prefix = 0
        ids = args[0] if args else kwargs.get("input_ids")
        logits = getattr(out, "logits", None)
        if from_prefix and isinstance(logits, Tensor) and isinstance(ids, Tensor) and logits.shape[1] == ids.shape[1]:
            assert self.prefix is not None
            first = self.prefix.logits.to(logits.dtype).expand(logits.shape[0], -1, -1)
            out.logits = torch.cat([first, logits], 1)
        return out


def attach(
    model: nn.Module, recipe: Recipe, prefix: Prefix | None = None, constants: Centers | Scales | None = None
) -> None:
    """Give a model's calls the cache and the prefix of a recipe; nothing if it has neither.

    The hooks stand in `model.qcompile_calls`; prefix and constants become submodules, so that checkpoints carry them.
    """
    cache_config = next((c for c in recipe.passes if isinstance(c, QuantizeKV)), None)
    if cache_config is None and prefix is None:
        return
    if prefix is not None:
        model.add_module(PREFIX, prefix)
    if constants is not None:
        constants.to(next(model.parameters()).device)  # calibration gathers on the CPU
        model.add_module(CENTERS if isinstance(constants, Centers) else SCALES, constants)
    hooks = GenerationHooks(cache_config, prefix, constants)
    object.__setattr__(model, "qcompile_calls", hooks)  # an attribute of ours, no parameter and no submodule
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after, with_kwargs=True)


def attach_loaded(model: nn.Module, recipe: Recipe) -> None:
    """As attach, for a model that was loaded and holds its prefix and constants already."""
    constants = getattr(model, CENTERS, None) or getattr(model, SCALES, None)
    attach(model, recipe, getattr(model, PREFIX, None), constants)


def hooks_of(model: nn.Module) -> GenerationHooks:
    """The hooks of a model; of one without any, hooks that give nothing."""
    return getattr(model, "qcompile_calls", None) or GenerationHooks(None)


def refuse_cache(model: nn.Module, recipe: Recipe | None, *, contrib_ops: bool, encoder: bool) -> None:
    """Refuse a model, or a recipe for it, that quantizes the cache in a way that no exported file can.

    Called before an export's long work.

    Raises:
        RecipeError: with what to use in its place.
    """
    of_recipe = [] if recipe is None else [c for c in recipe.passes if isinstance(c, QuantizeKV)]
    for config in (*of_recipe, hooks_of(model).config):
        if config is None:
            continue
        if not config.static:
            raise RecipeError(_NO_ONNX_FORM)
        if config.fp8:
            raise RecipeError(
                "this QuantizeKV has no form in ONNX: its codes are e4m3, and ONNX Runtime's attention reads int8. "
                "Fix: use QuantizeKV(8, static=True)"
            )
        if encoder and not config.optional:
            raise RecipeError("QuantizeKV: the file of an encoder (example=..) has no cache. Fix: drop QuantizeKV")
        if not contrib_ops and not config.optional:
            raise RecipeError(
                "a file of standard ONNX operators (contrib_ops=False) has a float cache: they would dequantize all of "
                "an int8 one for every token. Fix: drop QuantizeKV, or allow contrib_ops"
            )


@contextmanager
def detached(model: nn.Module) -> Iterator[GenerationHooks]:
    """Calls of the model without its cache and prefix, as an exporter needs them; gives the hooks."""
    hooks = hooks_of(model)
    before, hooks.enabled = hooks.enabled, False
    try:
        yield hooks
    finally:
        hooks.enabled = before
