"""The registry: every pass by the type of its config, and when it may run.

Passes register themselves with `@rewrites(Config, ...)` when `qcompile.passes` is imported; this file knows none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Protocol, TypeVar

from qcompile.ir.program import Program
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import PassReport

Need = Literal["absmax", "keys", "batches"]
"""What a pass needs: the absmax of site inputs, statistics of keys and values, or whole calibration batches."""


class Stage(IntEnum):
    """When a pass runs: stages run in this order, passes of one stage in any order.

    Up to ONLINE the function of the model stays as it is; from ACTIVATIONS on codes are chosen.
    """

    UNTIE = 1
    FOLD = 2
    SMOOTH = 3
    ROTATE = 4
    ONLINE = 5  # channel orders and transforms at run time, on the bases that rotations made
    KV_PREFIX = 6
    KV_CACHE = 7
    ACTIVATIONS = 8
    QUANTIZE = 9
    CORRECT = 10
    TRAIN = 11
    FUSE = 12


C = TypeVar("C", bound=PassConfig, contravariant=True)


class Pass(Protocol[C]):
    """A rewriting: changes the program in place and reports what it did and what it skipped."""

    def __call__(self, program: Program, config: C, context: PassContext, /) -> PassReport:
        """Rewrite `program` in place."""
        ...


Conflicts = Callable[[Any, Sequence[PassConfig]], list[str]]
"""conflicts(config, all configs of the recipe) -> faults as text."""


@dataclass(frozen=True)
class Registered:
    """What the pipeline knows of a pass.

    Attributes:
        run: the rewriting.
        stage: when it runs.
        exact: whether it must keep the output; then it is certified.
        needs: what it must be given, by config.
        requires: passes without which it cannot run, by config.
        conflicts: faults of the config beside the other configs of a recipe, as text.
        reads_float_weights: whether it compares codes with the float weights, which are kept for it.
        trains: whether it prepares a model for training (`qcompile.train`), where others prepare it for inference.
    """

    run: Pass[Any]
    stage: Stage
    exact: bool
    needs: Callable[[Any], tuple[Need, ...]]
    requires: Callable[[Any], tuple[type[PassConfig], ...]]
    conflicts: Conflicts
    reads_float_weights: bool
    trains: bool


_REGISTRY: dict[type[PassConfig], Registered] = {}

T = TypeVar("T")
D = TypeVar("D", bound=PassConfig)


def registered() -> dict[type[PassConfig], Registered]:
    """Config type -> pass."""
    return _REGISTRY


def rewrites(
    config: type[D],
    stage: Stage,
    *,
    exact: bool,
    needs: Callable[[D], tuple[Need, ...]] | tuple[Need, ...] = (),
    requires: Callable[[D], tuple[type[PassConfig], ...]] | tuple[type[PassConfig], ...] = (),
    conflicts: Conflicts = lambda _config, _passes: [],
    reads_float_weights: bool = False,
    trains: bool = False,
) -> Callable[[Pass[D]], Pass[D]]:
    """Register the decorated function as the pass of a config type.

    Args:
        config: the type of the configs in recipes.
        stage: when it runs.
        exact: whether it must keep the output of the model; each run is then certified.
        needs: what it must be given, or a function of the config.
        requires: configs without which it cannot run, or a function of the config.
        conflicts: see Conflicts.
        reads_float_weights: whether it compares codes with the float weights, which are kept for it.
        trains: whether it prepares a model for training; such passes stand in recipes of their own.

    Returns:
        A decorator that gives the function back unchanged.
    """

    def keep(run: Pass[D]) -> Pass[D]:
        _REGISTRY[config] = Registered(
            run, stage, exact, _by_config(needs), _by_config(requires), conflicts, reads_float_weights, trains
        )
        return run

    return keep


def _by_config(value: Callable[[Any], T] | T) -> Callable[[Any], T]:
    return value if callable(value) else lambda _config: value


def kinds(config: PassConfig) -> list[type[PassConfig]]:
    """What a pass counts as: itself, and the passes that it is a kind of."""
    return [cls for cls in type(config).__mro__ if cls in _REGISTRY]
