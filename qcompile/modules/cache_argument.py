"""The cache among a model's arguments and results: `past_key_values`, or `cache` from transformers 5.24 on."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from qcompile.modules.wrappers import unwrapped

NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name() -> str:
    """The name in the installed transformers, of an argument and of a field of a result."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return next(name for name in NAMES if name in fields)


def cache_argument(model: nn.Module) -> str | None:
    """The name under which a model's forward takes a cache; None if it names none."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache that a call was given, under either name; None for none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def with_cache(model: nn.Module, kwargs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Arguments of a call with this cache in place of the one that they have."""
    others = {name: value for name, value in kwargs.items() if name not in NAMES}
    return {**others, cache_argument(model) or cache_name(): cache}


def returned_cache(output: Any) -> Any:
    """The cache in a result; None if it has none."""
    fields = getattr(output, "__dict__", {})
    return next((fields[name] for name in NAMES if fields.get(name) is not None), None)
