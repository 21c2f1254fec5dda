"""A machine that stands in for a GPU: every call runs once, and the clock is a list."""

from __future__ import annotations

import itertools

import torch

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.tuning.gpu_timer import Machine

HERE = Gpu("stand-in", 132, (9, 0))


class StandIn(Machine):
    """Runs every call once, in the interpreter, and reads microseconds from a list, one for each timer in turn."""

    device, gpu, cache_bytes, there = torch.device("cpu"), HERE, 64, True

    def __init__(self, microseconds=None):
        self.microseconds, self.called = iter(microseconds or itertools.repeat(1.0)), []

    def timer(self, call, copies):
        self.called.append(copies)
        for index in range(copies):
            assert isinstance(call(index), torch.Tensor)
        value = next(self.microseconds)
        return lambda: value

    def release(self):
        pass

    def facts(self):
        return dict(gpu=self.gpu.name)
