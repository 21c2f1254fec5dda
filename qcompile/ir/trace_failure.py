"""Why a module gives no graph: its call fails on the inputs, gives nothing, or cannot be traced at a line."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

from qcompile.ir.call_tree import CallTree, tensors_of


class CaptureError(ValueError):
    """The model cannot be traced to one graph; the message names the place and the fix."""


class NotRunnable(CaptureError):
    """The model does not even run on the inputs that it was to be traced with."""


def failure(module: nn.Module, call: CallTree, error: Exception) -> CaptureError:
    """The error to raise for a module whose tracing failed; calls the module once more to tell the reasons apart.

    Args:
        module: what was traced.
        call: its arguments.
        error: what the tracer raised.
    """
    name = type(module).__name__
    try:
        with torch.no_grad():
            result = module(*call.args, **call.kwargs)
    except Exception as own:  # the model's own, of whatever kind
        return NotRunnable(
            f"{name} does not run on this example ({call}): {_first_line(own)}{_place(own)}. "
            "Fix: give the inputs that its forward takes, with their batch dimension"
        )
    if not tensors_of(result):
        return NotRunnable(
            f"{name} gives no tensor but {type(result).__name__}: nothing can be traced. "
            "Fix: quantize the module inside that computes"
        )
    return CaptureError(
        f"{name} cannot be traced to one graph: {_first_line(error)}{_place(error)}. "
        "Fix: make the named line traceable, or use torch.compile(model, backend='qcompile'), "
        "which compiles each sub-graph on its own."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """The last line of code that is neither PyTorch's nor ours, in the error or in what caused it."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    found = ""
    link: BaseException | None = error
    while link is not None:
        for frame in traceback.extract_tb(link.__traceback__):
            if not frame.filename.startswith(ours):
                found = f", at {frame.filename}:{frame.lineno}: {frame.line}"
        link = None if found else link.__cause__ or link.__context__
    return found
