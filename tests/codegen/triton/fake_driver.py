"""A driver of Triton without a GPU: its JIT binds, specializes and compiles as on one; a launch is only recorded.

What the interpreter and kernels compiled ahead of time cannot show: an M of 1, which the JIT makes a constant, sizes
that are multiples of 16, grids beyond a GPU's limits, and what a launch costs on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime.driver import driver

from qcompile.codegen.triton.aot.compile_kernels import SHARED_MEMORY
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch import gemm, pack_weights

MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class RecordedLaunch:
    """One launch.

    Attributes:
        name: of the kernel.
        grid: programs in three dimensions.
        shared: bytes of shared memory of a program.
        signature: Triton's type of every argument; "constexpr" of one that was compiled in.
        constants: values that were compiled in, by name.
    """

    name: str
    grid: tuple[int, int, int]
    shared: int
    signature: dict[str, str]
    constants: dict[str, object] = field(hash=False)


class FakeDriver:
    """What Triton asks of a driver."""

    def __init__(self, architecture: int, multiprocessors: int = 132, keep: bool = True):
        self.architecture, self.multiprocessors, self.keep = architecture, multiprocessors, keep
        self.launches: list[RecordedLaunch] = []
        self.utils = self

    def launcher_cls(self, source, metadata):
        names = list(source.fn.arg_names)
        constants = {names[index[0]]: value for index, value in source.constants.items()}

        def launch(x, y, z, stream, function, *arguments):
            if not self.keep:
                return
            assert all(1 <= size <= limit for size, limit in zip((x, y, z), MAX_GRID, strict=True)), (x, y, z)
            self.launches.append(
                RecordedLaunch(metadata.name, (x, y, z), metadata.shared, dict(source.signature), constants)
            )

        return launch

    def load_binary(self, name, kernel, shared, device):
        assert shared <= SHARED_MEMORY[self.architecture], f"{name}: {shared} bytes of shared memory"
        return 1, 2, 0, 0, 1024  # module, function, registers, spills, threads of a program at most

    def get_device_properties(self, device):
        return dict(max_shared_mem=SHARED_MEMORY[self.architecture], multiprocessor_count=self.multiprocessors)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def map_python_to_cpp_type(self, kind):
        return ty_to_cpp(kind)

    def get_active_torch_device(self):
        return torch.device("cpu")


def install(architecture: int, keep: bool = True) -> FakeDriver:
    """Make every launch of this process one of a GPU sm_`architecture` that is not there."""
    fake = FakeDriver(architecture, keep=keep)
    driver.set_active(fake)
    found = Gpu("fake", fake.multiprocessors, (architecture // 10, architecture % 10))
    gemm.gpu = lambda device: found
    pack_weights._on_gpu = lambda tensor: True
    return fake
