"""Example inputs: the arguments that a batch stands for, and those that a module is traced with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.program import Program
from qcompile.recipe.rule import RecipeError


def own_example(model: nn.Module) -> dict[str, Any]:
    """The example that a model brings (transformers' `dummy_inputs`). Raises RecipeError if it brings none."""
    example = getattr(model, "dummy_inputs", None)
    if not isinstance(example, dict):
        raise RecipeError(
            f"{type(model).__name__} brings no example input to trace with. Fix: "
            "qcompile.quantize(model, recipe, example=<a tensor, tuple or dict of inputs>)"
        )
    return example


def traceable_example(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments to trace a model with that brings its own example. Raises RecipeError."""
    return widen_batch(*call_of(own_example(model)))


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a calibration batch stands for.

    Args:
        batch: a mapping of keyword arguments (None values are dropped), a tuple or list of arguments, or one argument.

    Returns:
        Arguments by position and by name.
    """
    if isinstance(batch, Mapping):
        return (), {k: v for k, v in batch.items() if v is not None}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def widen_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of one row would be specialized by the tracer: trace with two."""

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1 else value

    return tuple(twice(a) for a in args), {k: twice(v) for k, v in kwargs.items()}


def flat_inputs(program: Program, batch: Any, first: dict[str, Any]) -> Sequence[Any]:
    """A batch as the flat inputs of a program.

    Args:
        program: captured from the first batch.
        batch: as for `call_of`.
        first: keyword arguments of the first batch, in their order.

    Returns:
        One value for each input of the program.

    Raises:
        CalibrationError: a batch whose arguments are not those of the first.
    """
    args, kwargs = call_of(batch)
    missing = [name for name in first if name not in kwargs]
    if missing:
        raise CalibrationError(
            f"a batch lacks {missing}, which the first batch has. Fix: give all batches the same keys"
        )
    flat = [*args, *[kwargs[name] for name in first]]
    if len(flat) != len(program.inputs):
        raise CalibrationError(
            f"a batch has {len(flat)} tensors, the model's graph takes {len(program.inputs)}. Fix: give these only"
        )
    return flat
