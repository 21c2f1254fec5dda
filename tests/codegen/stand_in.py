"""What stands in for a GPU that is timed: every call runs once, and the clock is a list."""

from __future__ import annotations

import itertools

import torch

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.tuning.gpu_timer import TimedGpu

STAND_IN = Gpu("stand-in", 132, (9, 0))


class StandIn(TimedGpu):
    """Runs every call once, in the interpreter, and reads microseconds from a list, one for each timer."""

    device, gpu, l2_bytes, available = torch.device("cpu"), STAND_IN, 64, True

    def __init__(self, microseconds=None):
        self.microseconds, self.copies = iter(microseconds or itertools.repeat(1.0)), []

    def timer(self, call, copies):
        self.copies.append(copies)
        for index in range(copies):
            assert isinstance(call(index), torch.Tensor)
        value = next(self.microseconds)
        return lambda: value

    def release_memory(self):
        pass

    def state(self):
        return dict(gpu=self.gpu.name)
