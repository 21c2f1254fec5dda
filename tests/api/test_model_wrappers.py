"""Wrappers around a model: the inner one is quantized, and the wrapper then calls it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group

import qcompile
from qcompile import QuantLinear, RecipeError
from qcompile.api.model_wrappers import described, inner_model


class Adapters(nn.Module):
    """As libraries of adapters wrap a model."""

    def __init__(self, model, own=False):
        super().__init__()
        self.base_model = model
        if own:
            self.prompt = nn.Parameter(torch.zeros(8))

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


@pytest.fixture
def one_process(tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    destroy_process_group()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "adapters": Adapters,
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_wrapper_then_calls_the_quantized_model(name, one_process):
    plain, inner = model(), model()
    wrapped = WRAPPERS[name](inner)
    with torch.no_grad():
        before = wrapped(X)  # what was compiled before must not be what runs after
        assert inner_model(wrapped) is inner
        assert all(s.quantized for s in qcompile.quantize(wrapped, "int8", example=X, progress=False).sites)
        qcompile.quantize(plain, "int8", example=X, progress=False)
        assert sum(isinstance(m, QuantLinear) for m in inner.modules()) == 2
        after = wrapped(X)
        assert torch.equal(after, plain(X)) and not torch.equal(after, before)


def test_compiled_parts_are_traced_through():
    parts = model()
    parts[0] = torch.compile(parts[0], backend="eager")
    parts.compile(backend="eager")
    report = qcompile.quantize(parts, "int8", example=X, progress=False)
    assert [site.name for site in report.sites] == ["0._orig_mod.weight", "2.weight"]
    assert all(site.quantized for site in report.sites)


def test_adapters_with_parameters_of_their_own_stay():
    inner = model()
    wrapped = Adapters(inner, own=True)
    assert inner_model(wrapped) is wrapped and described(wrapped) is inner and described(inner) is inner


def test_shards_are_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(RecipeError, match=r"0.weight is a shard .*Fix: quantize the whole model before it is sharded"):
        qcompile.quantize(sharded, "int8", example=X, progress=False)


def test_wrapped_shards_are_refused():
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(RecipeError, match="the model is sharded by FSDP. Fix"):
        inner_model(sharded)
