"""Batches: the call that each stands for, and what a module is traced with.

A batch is a mapping of keyword arguments, a tuple or list of arguments, or one argument. Where it holds no tensor,
numpy arrays and lists of int or float become tensors; what a tensor cannot be made of is refused with a sentence.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.api.device_placement import device_of
from qcompile.api.missing_masks import with_all_masks
from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.call_tree import CallTree, map_leaves, shape_of
from qcompile.ir.capture import capture
from qcompile.ir.program import Program
from qcompile.ir.trace_failure import CaptureError, NotRunnable

_TOKENIZE = "Fix: give token ids: tokenizer(text, return_tensors='pt')"


def read_batches(batches: Iterable[Any]) -> list[Any]:
    """All batches of an iterable, read once.

    Raises:
        CalibrationError: it is one batch rather than several, or gives none.
    """
    if isinstance(batches, (str, bytes)):
        raise CalibrationError(f"batches is a string, not an iterable of batches. {_TOKENIZE}, in a list")
    if isinstance(batches, (Mapping, Tensor)) or _is_array(batches):
        raise CalibrationError(
            f"batches is one {type(batches).__name__}, not an iterable of batches. Fix: give a list: [batch]"
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise CalibrationError(f"batches is {type(batches).__name__}, not an iterable of batches. Fix: give a list")
    data = list(batches)
    if not data and isinstance(batches, Iterator):
        raise CalibrationError(
            "the calibration iterator is empty, or was read to its end before: it gives its batches once. "
            "Fix: make it anew, or give a list"
        )
    if not data:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")
    return data


def call_of(
    batch: Any, model: nn.Module | None = None, name: str = "a batch"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a batch stands for, on the device of the model.

    Args:
        batch: a mapping of keyword arguments (None values are dropped), a tuple or list of arguments, or one argument.
        model: what takes them.
        name: of the batch in messages.

    Returns:
        Arguments by position and by name.

    Raises:
        CalibrationError: text, or lists of which no tensor can be made.
    """
    args, kwargs = _arguments_of(batch, model, name)
    device = None if model is None else device_of(model)
    if device is None:
        return args, kwargs
    call = CallTree.of(args, kwargs).mapped(lambda _path, v: v.to(device) if isinstance(v, Tensor) else v)
    return call.args, call.kwargs


def _arguments_of(batch: Any, model: nn.Module | None, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    _refuse_text(batch, name, model)
    lists = not _holds_tensors(batch)
    if hasattr(batch, "_fields"):  # a namedtuple: arguments if it has their names, else one argument
        named = model is not None and set(batch._fields) <= set(inspect.signature(model.forward).parameters)
        batch = batch._asdict() if named else (batch,)
    elif isinstance(batch, Mapping) and model is not None and _is_one_argument(batch, model):
        batch = (batch,)
    if isinstance(batch, Mapping):
        given = {str(k): v for k, v in batch.items() if v is not None}
        row = all(_is_flat(v) for v in given.values() if isinstance(v, list))  # one row of a data set
        return (), {k: _as_tensors(v, f"{k!r} of {name}", lists, row) for k, v in given.items()}
    if isinstance(batch, list) and lists and _is_nested_values(batch):
        return (_as_tensors(batch, name, True, True),), {}
    if isinstance(batch, (tuple, list)):
        row = all(_is_flat(v) for v in batch if isinstance(v, list))
        return tuple(_as_tensors(v, f"argument {i} of {name}", lists, row) for i, v in enumerate(batch, 1)), {}
    return (_as_tensors(batch, name, lists, True),), {}


def _is_one_argument(batch: Mapping[Any, Any], model: nn.Module) -> bool:
    """Whether a module takes a mapping as its one argument: it has no parameter of the keys' names, and one in all."""
    parameters = inspect.signature(model.forward).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    return kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] and not set(parameters) & set(batch)


def widen_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of one row would be specialized by the tracer: trace with two."""

    def twice(_path: str, value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1 else value

    wide = CallTree.of(args, kwargs).mapped(twice)
    return wide.args, wide.kwargs


def trace_batches(
    model: nn.Module, batches: Sequence[Any], names: Sequence[str] = ()
) -> tuple[Program, list[list[Tensor]]]:
    """The Program of a model, traced with the first batch, and all batches as its flat inputs.

    Args:
        model: in evaluation mode.
        batches: at least one, as for `call_of`.
        names: of the batches in messages; none: "batch 1" and so on.

    Raises:
        CalibrationError: a batch that is not like the first.
        CaptureError: no graph can be had of the first.
    """
    names = names or [f"batch {number}" for number in range(1, len(batches) + 1)]
    calls = [CallTree.of(*call_of(batch, model, name), model) for batch, name in zip(batches, names, strict=True)]
    calls = with_all_masks(calls)
    first = calls[0]
    for call, name in zip(calls, names, strict=True):
        _check_like(first, call, name)
    program = _trace(model, first)
    return program, [_flat(program, first, call, name) for call, name in zip(calls, names, strict=True)]


def _trace(model: nn.Module, first: CallTree) -> Program:
    """With two rows where there is one; as it is where the first size of some tensor is no batch size.

    Where arithmetic of sizes cannot be traced, the sizes of the first batch are those of all.
    """
    wide = CallTree.of(*widen_batch(first.args, first.kwargs), model)
    if any(a is not b for a, b in zip(wide.tensors.values(), first.tensors.values(), strict=True)):
        with contextlib.suppress(CaptureError):
            program = capture(model, wide.args, wide.kwargs)
            if _misfit(program, first.tensors) is None:
                return program
    try:
        return capture(model, first.args, first.kwargs)
    except NotRunnable:
        raise
    except CaptureError as error:
        with contextlib.suppress(CaptureError):
            return capture(model, first.args, first.kwargs, dynamic=False)
        raise error


def flat_inputs(program: Program, batch: Any, first: Any, name: str = "a batch") -> list[Tensor]:
    """A batch as the flat inputs of a program.

    Args:
        program: captured from the first batch.
        batch: as for `call_of`.
        first: the first batch.
        name: of the batch in messages.

    Returns:
        One tensor for each input of the program.

    Raises:
        CalibrationError: a batch whose arguments are not those of the first.
    """
    like, call = CallTree.of(*call_of(first)), CallTree.of(*call_of(batch, name=name))
    _check_like(like, call, name)
    return _flat(program, like, call, name)


def _check_like(first: CallTree, call: CallTree, name: str) -> None:
    difference = call.difference(first, "the first batch")
    if difference is not None:
        raise CalibrationError(f"{name} {difference}. Fix: give all batches the same keys and constants")


def _flat(program: Program, first: CallTree, call: CallTree, name: str) -> list[Tensor]:
    tensors = call.tensors
    ordered = {path: tensors[path].detach() for path in first.tensors}
    misfit = _misfit(program, ordered)
    if misfit is not None:
        raise CalibrationError(f"{name}: {misfit}. Fix: give all batches the form of the first")
    return list(ordered.values())


def _misfit(program: Program, tensors: Mapping[str, Tensor]) -> str | None:
    """Which tensor does not fit the sizes that the graph was traced for; None if all do."""
    for node, (path, tensor) in zip(program.inputs, tensors.items(), strict=True):
        traced = node.meta["val"]
        sizes = [_fixed(size) for size in traced.shape]
        fits = len(sizes) == tensor.ndim and all(s in (None, n) for s, n in zip(sizes, tensor.shape, strict=True))
        if not fits or (traced.dtype != tensor.dtype and traced.is_floating_point()):
            shape = f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"
            return f"{path} is {shape_of(tensor)}, and the graph takes {str(traced.dtype)[6:]} {shape}"
    return None


def _fixed(size: int | torch.SymInt) -> int | None:
    """The one value that a size of the graph may have; None if there are several."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _refuse_text(batch: Any, where: str, model: nn.Module | None) -> None:
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters if model is not None else {}
        for key, value in batch.items():
            if _is_text(value) and key not in parameters:
                raise CalibrationError(
                    f"{key!r} of {where} is text, and models take tensors. {_TOKENIZE}, or drop this key"
                )
    elif _is_text(batch):
        raise CalibrationError(f"{where} is text ({batch!r:.50}), and models take tensors. {_TOKENIZE}")


def _is_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(_is_text(item) for item in value)
    return isinstance(value, (str, bytes)) or (_is_array(value) and value.dtype.kind in "USO")


def _is_array(value: Any) -> bool:
    """Whether a value is an array or scalar of numpy, which need not be installed."""
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype") and hasattr(value, "item")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor) or (_is_array(value) and value.ndim > 0)


def _is_flat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)


def _is_nested_values(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, list) and len(value) > 0 and all(map(_is_nested_values, value))
    )


def _as_tensors(value: Any, where: str, lists: bool, row: bool) -> Any:
    """A value with tensors in place of arrays and, with `lists`, of lists; `row` gives flat lists a batch
    dimension."""
    if lists and isinstance(value, list) and _is_nested_values(value):
        try:
            tensor = torch.tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CalibrationError(
                f"{where} has rows of unequal lengths: no tensor can be made of it. Fix: pad the rows, as "
                "tokenizer(texts, padding=True, return_tensors='pt') does, and give the attention_mask"
            ) from error
        return tensor[None] if row and tensor.ndim == 1 else tensor

    def convert(_path: str, leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        if leaf.ndim == 0:
            return leaf.item()
        if leaf.dtype.kind in "USOV":
            raise CalibrationError(f"{where} is an array of {leaf.dtype}, and models take tensors. {_TOKENIZE}")
        return torch.tensor(leaf)

    return map_leaves(value, convert)
