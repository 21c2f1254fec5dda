"""The kernels of a device are used where a model is on it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.backend import rounding_kernels
from qcompile.backend.rounding_kernels import install_rounding
from qcompile.codegen.triton import gpu_rounding


@pytest.mark.parametrize("devices", [[], ["cpu"], ["cuda"], ["cuda", "cuda"], ["cpu", "cuda"], ["meta"]])
def test_kernels_by_device(devices, monkeypatch):
    installed = []
    monkeypatch.setattr(rounding_kernels, "install_cpu_rounding", lambda: installed.append("cpu"))
    monkeypatch.setattr(gpu_rounding, "install_gpu_rounding", lambda: installed.append("cuda"))
    with FakeTensorMode():
        install_rounding(torch.empty(2, device=device) for device in devices)
    assert installed == sorted(set(devices) - {"meta"})
