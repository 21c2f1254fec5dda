"""Lowering to ExecuTorch without the package: what is missing is named, and a product without a kernel is refused.

The programs themselves are run by `make test-executorch`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qcompile.checkpoint.writers import executorch_program
from qcompile.checkpoint.writers.executorch_program import require_executorch, run_program, write_program
from qcompile.checkpoint.writers.export_refusals import ExportError


@pytest.mark.parametrize("missing", ["torchao", "executorch"])
def test_a_missing_package_is_named_with_its_fix(missing, monkeypatch):
    found = []
    monkeypatch.setattr(executorch_program, "importlib", SimpleNamespace(import_module=found.append))
    require_executorch()
    assert found == ["torchao", "executorch"]
    monkeypatch.setattr(executorch_program, "importlib", importlib)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "executorch", ModuleType("executorch"))
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    with pytest.raises(ExportError, match=rf"{missing}.*Fix: pip install 'torch-qcompile\[edge\]'"):
        require_executorch()


class Lowered:
    """What `to_edge_transform_and_lower` gives."""

    def __init__(self, *targets, path="model.layers.0.mlp"):
        stack = {"L0": ("", object), "L1": (path, object)}
        self.nodes = [
            SimpleNamespace(target=target, name=target, meta={"nn_module_stack": stack}) for target in targets
        ]

    def exported_program(self):
        return SimpleNamespace(graph=SimpleNamespace(nodes=iter(self.nodes)))

    def to_executorch(self):
        return SimpleNamespace(write_to_file=lambda file: file.write(b"program"))


@pytest.fixture
def lower(monkeypatch):
    """Stand-ins for ExecuTorch; the arguments of the last lowering, and what it gives."""
    last = SimpleNamespace(gives=None, arguments=None)

    def to_edge_transform_and_lower(graph, **options):
        last.arguments = graph, options
        return last.gives

    partition = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    names = partition.split(".")
    for name in (*(".".join(names[: i + 1]) for i in range(len(names))), "executorch.exir", "executorch.runtime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[partition].XnnpackPartitioner = lambda: "xnnpack"
    sys.modules["executorch.exir"].to_edge_transform_and_lower = to_edge_transform_and_lower
    return last


def test_a_program_is_written_and_its_parts_are_counted(tmp_path, lower):
    lower.gives = Lowered("executorch_call_delegate", "aten.embedding", "executorch_call_delegate")
    assert write_program("graph", tmp_path / "m.pte", {"get_vocab_size": 5}) == 2
    assert (tmp_path / "m.pte").read_bytes() == b"program"
    assert lower.arguments == ("graph", {"partitioner": ["xnnpack"], "constant_methods": {"get_vocab_size": 5}})
    write_program("graph", tmp_path / "m.pte", {})
    assert lower.arguments[1]["constant_methods"] is None


@pytest.mark.parametrize(
    "name", ["torchao.dequantize_affine", "torchao.choose_qparams_affine", "torchao.quantize_affine"]
)
def test_a_product_without_a_kernel_is_refused(tmp_path, lower, name):
    lower.gives = Lowered("executorch_call_delegate", name)
    with pytest.raises(ExportError, match="model.layers.0.mlp: torchao.*, for which XNNPACK has no kernel"):
        write_program("graph", tmp_path / "m.pte", {})
    assert not (tmp_path / "m.pte").exists()
    lower.gives.nodes[1].meta = {}
    with pytest.raises(ExportError, match=f"{name}: {name}"):
        write_program("graph", tmp_path / "m.pte", {})


def test_a_program_is_opened_once_for_all_calls(lower):
    opened = []

    class Runtime:
        @staticmethod
        def get():
            return Runtime()

        def load_program(self, path):
            opened.append(path)
            return self

        def load_method(self, name):
            assert name == "forward"
            memory = torch.zeros(2)  # which the next call writes

            def execute(inputs):
                memory.copy_(memory + inputs[0])
                return [memory, 7]

            return SimpleNamespace(execute=execute)

    sys.modules["executorch.runtime"].Runtime = Runtime
    found = run_program("m.pte", [(torch.ones(2),), (torch.ones(2),)])
    assert opened == ["m.pte"] and [[t.tolist() for t in out] for out in found] == [[[1, 1]], [[2, 2]]]
