"""Timing by CUDA graphs and the state of a GPU, without one: every call is checked against the names in torch.cuda."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch import gemm
from qcompile.codegen.triton.tuning import gpu_timer
from qcompile.codegen.triton.tuning.gpu_timer import TimedGpu, clocks, graph_timer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a GPU that is there")


class Cuda:
    """What graph_timer takes of torch.cuda, written down in order; a name that torch.cuda has not is an error."""

    def __init__(self):
        self.log = []

    def __getattr__(self, name):
        assert hasattr(torch.cuda, name), name
        log = self.log

        class Thing:
            def __init__(self, *args, **kwargs):
                log.append(name)

            def __enter__(self):
                log.append(f"into {name}")

            def __exit__(self, *error):
                log.append(f"out of {name}")

            def __getattr__(self, method):
                assert hasattr(getattr(torch.cuda, name.replace("current_stream", "Stream")), method), (name, method)
                return lambda *args: log.append(method) or (7.0 if method == "elapsed_time" else None)

        return Thing


def test_a_cuda_graph_is_warmed_on_a_stream_of_its_own_captured_and_replayed():
    cuda, calls = Cuda(), []
    once = graph_timer(lambda i: calls.append((i, len(cuda.log))), 3, cuda)
    log = cuda.log
    assert [i for i, _ in calls] == [0, 1, 2] * 2
    assert all(log.index("into stream") < at <= log.index("out of stream") for _, at in calls[:3])
    assert all(log.index("into graph") < at <= log.index("out of graph") for _, at in calls[3:])
    assert log.index("out of stream") < log.index("into graph")
    del log[:]
    assert once() == pytest.approx(7e3 / 3)  # milliseconds of all -> microseconds of one
    assert log == ["record", "replay", "record", "synchronize", "elapsed_time"] and len(calls) == 6


def test_a_gpu_describes_itself(monkeypatch):
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    known = stub.split("class _CudaDeviceProperties")[1].split("\nclass ")[0]
    properties = dict(name="H200", multi_processor_count=132, major=9, minor=0, L2_cache_size=6 * 10**7, uuid="ab-cd")
    assert all(f"    {name}: " in known for name in properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(**properties))
    monkeypatch.setattr(gpu_timer, "clocks", lambda uuid: {"clocks.sm": uuid})
    assert TimedGpu().l2_bytes == 6 * 10**7 and TimedGpu().gpu == Gpu("H200", 132, (9, 0))
    found = TimedGpu().state()
    assert found["gpu"] == "H200" and found["clocks"] == {"clocks.sm": "ab-cd"} and "triton" in found
    gemm.gpu.cache_clear()


def test_clocks_are_what_nvidia_smi_says():
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return types.SimpleNamespace(stdout="570.1, 1980, 3201, 1980, 3201, 212.5, 700.0, 41\n")

    found = clocks("ab-cd", run)
    assert found["clocks.sm"] == "1980" and found["power.limit"] == "700.0" and found["temperature.gpu"] == "41"
    assert commands[0][0] == "nvidia-smi" and "--id=GPU-ab-cd" in commands[0]
    assert "No such file" in clocks("x", lambda *_, **__: (_ for _ in ()).throw(OSError("No such file")))["unknown"]
