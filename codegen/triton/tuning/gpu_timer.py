"""The GPU that kernels are timed on: how a call is timed, how large its cache is, and what state it is in.

Tests put a stand-in in its place: the same calls, run by Triton's interpreter, and a clock of its own.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch import gemm
from qcompile.memory.environment import versions

CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
          "temperature.gpu")  # fmt: skip


class TimedGpu:
    """The first GPU."""

    device = torch.device("cuda", 0)

    @property
    def available(self) -> bool:
        """Whether there is one."""
        return torch.cuda.is_available()

    @property
    def gpu(self) -> Gpu:
        """Its description, which launches and measured times are kept under."""
        return gemm.gpu(self.device)

    @property
    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def timer(self, call: Callable[[int], Any], copies: int) -> Callable[[], float]:
        """A reading is microseconds of one call(i), over i below `copies` in one CUDA graph."""
        return graph_timer(call, copies)

    def release_memory(self) -> None:
        """Give unused memory back."""
        torch.cuda.empty_cache()

    def state(self) -> dict[str, Any]:
        """Versions, the GPU, and its clocks as they are now."""
        import triton

        found = torch.cuda.get_device_properties(self.device)
        own = dict(gpu=found.name, multiprocessors=found.multi_processor_count, triton=triton.__version__)
        return versions() | own | dict(cuda=torch.version.cuda, clocks=clocks(str(found.uuid)))


def graph_timer(call: Callable[[int], Any], copies: int, cuda: Any = torch.cuda) -> Callable[[], float]:
    """Capture the calls over all copies in a CUDA graph; a reading is microseconds of one call.

    Args:
        call: takes the index of a copy.
        copies: of the weight.
        cuda: torch.cuda, or what a test puts in its place.
    """
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for index in range(copies):  # compiles, and chooses algorithms
            call(index)
    cuda.current_stream().wait_stream(stream)
    graph, kept = cuda.CUDAGraph(), []
    with cuda.graph(graph):
        for index in range(copies):
            kept.append(call(index))
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / copies

    return once


def clocks(uuid: str, run: Callable[..., Any] = subprocess.run) -> dict[str, str]:
    """What nvidia-smi says of a GPU now; the reason where it says nothing: a reading without clocks is still one."""
    command = ["nvidia-smi", f"--id=GPU-{uuid.removeprefix('GPU-')}", "--query-gpu=" + ",".join(CLOCKS),
               "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        done = run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": str(error)}
    return dict(zip(CLOCKS, (value.strip() for value in done.stdout.strip().split(",")), strict=False))
