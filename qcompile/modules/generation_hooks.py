"""What a recipe gives to the calls of a module rather than to its weights.

A quantized key/value cache (QuantizeKV) and the float keys and values of a prefix (IntactKV): a call
without a cache, or with a fresh empty one as `generate` makes it, gets a cache of ours, and a text
that begins with the prefix starts behind it. A cache of the caller's own is left alone.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.modules.kv_constants import CENTERS, PREFIX, SCALES, Centers, Prefix, Scales
from qcompile.passes.kv_cache.intact_kv import IntactKV
from qcompile.passes.kv_cache.quantize_kv import QuantizeKV
from qcompile.recipe.recipe import Recipe, RecipeError
from qcompile.recipe.report import PassReport

NO_QUANTIZED_CACHE = (
    "this QuantizeKV has no form in ONNX: it makes a scale and a zero point for every head of every token as the token "
    "comes, and ONNX Runtime's attention reads caches with fixed scales only (one, or one for each channel) and "
    "without zero points. Use QuantizeKV(8, static=True), or leave it out: the cache is float32 then"
)


class DoesNotFit(RecipeError):
    """A cache that a model has no place for: the reason, and apart from it the mend for who asked for the cache."""

    def __init__(self, reason: str, mend: str, who: str) -> None:
        super().__init__(f"{who}: {reason}: {mend}")
        self.reason = reason


def resolve(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with the model's own beginning-of-sequence token where IntactKV names no prefix."""
    token = getattr(getattr(model, "config", None), "bos_token_id", None)
    if not isinstance(token, int):
        return recipe
    passes = [IntactKV((token,)) if isinstance(c, IntactKV) and not c.prefix else c for c in recipe.passes]
    return dataclasses.replace(recipe, passes=tuple(passes))


def _of(recipe: Recipe, kind: type) -> Any:
    return next((config for config in recipe.passes if isinstance(config, kind)), None)


def fit_cache(
    model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], attentions: int
) -> tuple[Recipe, list[tuple[int, int]], PassReport | None]:
    """Find what each layer caches, by one call with a cache.

    Args:
        attentions: how many the captured graph has.

    Returns:
        The recipe, without an optional QuantizeKV that cannot work here; the heads of the keys and of the values of
        each layer, none if the recipe asks for no cache; and the report on what was left out.

    Raises:
        RecipeError: the recipe needs a cache and the model takes none, or leaves it empty; fixed scales for a
            prefix that is to stay float; what is found for an attention of the graph, for a cache with other layers.
    """
    cache, prefix = _of(recipe, QuantizeKV), _of(recipe, IntactKV)
    wanted = cache or prefix
    if wanted is None:
        return recipe, [], None
    if cache is not None and cache.static and prefix is not None:
        raise RecipeError("IntactKV keeps its tokens float, which a cache with fixed scales cannot: drop one of them")
    optional = cache is not None and cache.optional and prefix is None
    of_attentions = prefix or (cache if cache.static or cache.center else None)
    try:
        heads = _heads_of_cache(model, args, kwargs, type(wanted).__name__, alone=not optional)
        if of_attentions is not None and len(heads) != attentions:
            who = type(of_attentions).__name__
            mend = f"drop {who}" if of_attentions is prefix else f"use {'center' if cache.center else 'static'}=False"
            raise DoesNotFit(f"the graph has {attentions} attentions, the cache {len(heads)} layers", mend, who)
        return recipe, heads, None
    except DoesNotFit as error:
        if not optional:
            raise
        report = PassReport("QuantizeKV")
        report.skip("cache", f"stays float: {error.reason}")
    return dataclasses.replace(recipe, passes=tuple(c for c in recipe.passes if c is not cache)), [], report


def _heads_of_cache(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], who: str, *, alone: bool
) -> list[tuple[int, int]]:
    """Of every layer. alone: also of a model that fills a cache and does not hand it on, as encoders do."""
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" in takes:
        from qcompile.modules.kv_cache import KVCache

        held = KVCache(8)
        asked = {"past_key_values": held, **({"use_cache": True} if "use_cache" in takes else {})}
        try:
            with torch.no_grad():
                out = model(*args, **{**kwargs, **asked})
        except Exception as error:  # the model's own, of whatever kind
            reason = (
                f"{type(model).__name__} does not run with a cache of keys and values only, as for instance hybrids "
                f"with other layers do not ({type(error).__name__}: {error})"
            )
            raise DoesNotFit(reason, f"drop {who}", who) from error
        if held.get_seq_length() and (alone or getattr(out, "past_key_values", None) is not None):
            return held.heads
    raise DoesNotFit(
        f"{type(model).__name__} puts nothing into past_key_values, where keys and values are held",
        f"drop {who}; torch.compile(model, backend='qcompile') can round them in the graph",
        who,
    )


def make_prefix(recipe: Recipe, tensors: dict[str, Tensor], heads: list[tuple[int, int]]) -> Prefix | None:
    """The prefix from what the pass IntactKV computed; heads repeated for grouped queries are dropped."""
    config = _of(recipe, IntactKV)
    if config is None:
        return None
    layers = []
    for index, (of_keys, of_values) in enumerate(heads):
        keys, values = tensors[f"{index}.keys"], tensors[f"{index}.values"]
        layers.append(
            (keys[:, :: keys.shape[1] // of_keys].clone(), values[:, :: values.shape[1] // of_values].clone())
        )
    return Prefix(torch.tensor(config.prefix), layers, tensors["logits"])


def make_constants(tensors: dict[str, Tensor], heads: list[tuple[int, int]]) -> Centers | Scales | None:
    """The mean keys, or the fixed scales, from what the pass QuantizeKV gathered; of repeated heads one each."""

    def of_heads(tensor: Tensor, count: int) -> Tensor:
        return tensor[:: max(1, len(tensor) // count)].clone()

    centers, of_keys, of_values = (
        [tensor for name, tensor in tensors.items() if name.endswith(f".{kind}")]
        for kind in ("center", "key_scale", "value_scale")
    )
    if centers:
        return Centers([of_heads(mean, n) for mean, (n, _) in zip(centers, heads, strict=True)])
    if not of_keys:
        return None
    pairs = zip(of_keys, of_values, heads, strict=True)
    return Scales([(of_heads(keys, n), of_heads(values, m)) for keys, values, (n, m) in pairs])


def attach(
    model: nn.Module, recipe: Recipe, prefix: Prefix | None = None, constants: Centers | Scales | None = None
) -> None:
    """Give a model's calls the cache and the prefix of a recipe; nothing if it has neither."""
    cache_of = _of(recipe, QuantizeKV)
    if cache_of is None and prefix is None:
        return
    if prefix is not None:
        model.add_module(PREFIX, prefix)
    if constants is not None:
        constants.to(next(model.parameters()).device)  # calibration gathers on the CPU
        model.add_module(CENTERS if isinstance(constants, Centers) else SCALES, constants)
    calls = Calls(cache_of, prefix, constants)
    model.qcompile_calls = calls
    model.register_forward_pre_hook(calls.before, with_kwargs=True)
    model.register_forward_hook(calls.after, with_kwargs=True)


def attach_again(model: nn.Module, recipe: Recipe) -> None:
    """As attach, for a model that holds what was attached: one that was loaded."""
    constants = getattr(model, CENTERS, None) or getattr(model, SCALES, None)
    attach(model, recipe, getattr(model, PREFIX, None), constants)


def refuse_cache(model: nn.Module, recipe: Recipe | None, *, portable: bool, encoder: bool) -> None:
    """Raise RecipeError if a model, or a recipe for it, quantizes the cache in a way that no exported file can.

    Asked before an export's long work.
    """
    calls = getattr(model, "qcompile_calls", None)
    asked = (None if recipe is None else _of(recipe, QuantizeKV), None if calls is None else calls.config)
    for config in filter(None, asked):
        if not config.static:
            raise RecipeError(NO_QUANTIZED_CACHE)
        if encoder and not config.optional:
            raise RecipeError("QuantizeKV: the file of an encoder has no cache (example=..): leave it out")
        if portable and not config.optional:
            raise RecipeError(
                "a portable file has a float cache: operators of the standard would turn all of an int8 one to float "
                "for every token. Leave QuantizeKV out, or portable"
            )


@contextmanager
def detached(model: nn.Module) -> Iterator[Calls]:
    """Calls of the model without its cache and prefix, as an exporter needs them; gives what they were."""
    calls: Calls = getattr(model, "qcompile_calls", None) or Calls(None)
    calls.enabled = False
    try:
        yield calls
    finally:
        calls.enabled = True


class Calls:
    """The hooks of one model, and what they give to its calls."""

    enabled = True

    def __init__(
        self, config: QuantizeKV | None, prefix: Prefix | None = None, constants: Centers | Scales | None = None
    ) -> None:
        self.config, self.prefix = config, prefix
        self.centers = constants if isinstance(constants, Centers) else None
        self.scales = constants if isinstance(constants, Scales) else None
        self.skipped = 0  # tokens of the call in progress that come from the prefix

    def before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the call a cache, and start it behind the prefix."""
        from transformers.cache_utils import DynamicCache

        from qcompile.modules.kv_cache import KVCache

        self.skipped = 0
        if not self.enabled:
            return args, kwargs
        cache = kwargs.get("past_key_values")
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            return args, kwargs
        ids = args[0] if args else kwargs.get("input_ids")
        starts = self.prefix is not None and isinstance(ids, Tensor) and self.prefix.starts(ids)
        if self.config is None and not starts:
            return args, kwargs
        own: Any = DynamicCache()
        if self.config is not None:
            config = self.config
            means = None if self.centers is None else self.centers.all
            scales = None if self.scales is None else self.scales.all
            own = KVCache(
                config.bits, hadamard=config.hadamard, sink_tokens=config.sink_tokens, centers=means, scales=scales
            )
        kwargs = {**kwargs, "past_key_values": own}
        if starts:
            assert self.prefix is not None and isinstance(ids, Tensor)
            p = self.skipped = len(self.prefix.ids)
            for index, (keys, values) in enumerate(zip(*self.prefix.caches(len(ids)), strict=True)):
                if self.config is not None:
                    own.sink_tokens = max(own.sink_tokens, p)
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
