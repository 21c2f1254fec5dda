"""Devices without kernels: the model is compiled as it is, and one line says so."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from qcompile.backend import dynamo, supported_devices
from qcompile.backend.supported_devices import without_kernels


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    device = torch.device("xpu", 0)


def elsewhere():
    return torch.randn(2, 4).as_subclass(Elsewhere)


class OnCuda(torch.Tensor):
    device = torch.device("cuda", 0)
    is_cuda = True


def test_cpus_and_nvidia_gpus_have_kernels(monkeypatch):
    cpu, cuda, other = torch.ones(2), torch.ones(2).as_subclass(OnCuda), elsewhere()
    assert without_kernels([cpu, 3, None]) is None and without_kernels([cuda]) is None
    assert without_kernels([cpu, other]) == "xpu:0"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert without_kernels([cpu]) is None and without_kernels([cuda]) == "cuda:0 (ROCm 6.4)"


def test_a_model_elsewhere_is_compiled_as_it_is_and_said_once(monkeypatch):
    graph = fx.symbolic_trace(torch.nn.Linear(4, 3))
    compiled = []
    monkeypatch.setattr(dynamo, "compile_graph", lambda module, *_: compiled.append(module) or module.forward)
    monkeypatch.setattr(supported_devices, "_warned", set())
    with pytest.warns(UserWarning, match="none for xpu:0: Inductor compiles the model as it is") as found:
        for _ in range(2):
            dynamo.qcompile(graph, [elsewhere()])
    assert compiled == [graph, graph] and len(found) == 1
