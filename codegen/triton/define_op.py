"""An operator of torch with a CUDA, a CPU and a fake version, as thin as the dispatcher allows.

`torch.library.custom_op` wraps every call in more Python, which a decoded token pays for at every site. Here the
versions are registered as they are. None has a gradient: whoever trains uses the dialect's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("qcompile_triton", "FRAGMENT")


class TritonOp:
    """Decorators that register the versions of one operator; the CUDA version gives its name and schema."""

    def __init__(self, on_cuda: Callable[..., Any]) -> None:
        self.name = on_cuda.__name__
        self.on_cuda = on_cuda
        _LIBRARY.define(self.name + torch.library.infer_schema(on_cuda, mutates_args=()))
        _LIBRARY.impl(self.name, on_cuda, "CUDA")

    def on_cpu(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the definition in plain torch."""
        _LIBRARY.impl(self.name, function, "CPU")
        return function

    def on_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register shapes and dtypes of the result."""
        torch.library.register_fake(f"qcompile_triton::{self.name}", function, lib=_LIBRARY)
        return function
