"""The registry: every pass by the type of its config.

Passes register themselves with `@rewrites(Config, ...)`; this file knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rewrite = Callable[..., Any]
"""A pass: `rewrite(program, how, seen) -> PassReport`, in place."""


@dataclass(frozen=True)
class Registered:
    """What the pipeline knows of a pass.

    Attributes:
        run: the function. exact: whether it must keep the output (then it is certified).
        sitewise: it also takes what the rules and the caller say of single sites, as a last argument.
        needs: statistics it must be given, by config. after: passes that must stand before it.
        requires: passes without which it cannot run, by config.
        conflicts: faults of the config beside the other configs of a recipe, as text.
    """

    run: Rewrite
    exact: bool
    sitewise: bool
    needs: Callable[[Any], tuple[str, ...]]
    after: tuple[str, ...]
    requires: Callable[[Any], tuple[str, ...]]
    conflicts: Callable[[Any, tuple[Any, ...]], list[str]]


_REGISTRY: dict[type, Registered] = {}


def registered() -> dict[type, Registered]:
    """Config type -> pass."""
    return _REGISTRY


def rewrites(
    config: type,
    *,
    exact: bool,
    sitewise: bool = False,
    needs: Callable[[Any], tuple[str, ...]] | tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    requires: Callable[[Any], tuple[str, ...]] | tuple[str, ...] = (),
    conflicts: Callable[[Any, tuple[Any, ...]], list[str]] = lambda _config, _passes: [],
) -> Callable[[Rewrite], Rewrite]:
    """Register the decorated function as the pass of a config type."""

    def constant(value: Any) -> Callable[[Any], tuple[str, ...]]:
        return value if callable(value) else lambda _config: value

    def keep(run: Rewrite) -> Rewrite:
        _REGISTRY[config] = Registered(run, exact, sitewise, constant(needs), after, constant(requires), conflicts)
        return run

    return keep


def kinds(config: Any) -> list[str]:
    """What a pass counts as: its own name, and those of the passes that it is a kind of."""
    return [cls.__name__ for cls in type(config).__mro__ if cls in registered()]
