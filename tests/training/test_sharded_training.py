"""Models in training whose parameters `fully_shard` (FSDP2) splits: equal to models that are whole."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from q_galore_models import FLOAT, data, loss_of
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qcompile
from qcompile import RecipeError
from qcompile.passes import QGaLore
from qcompile.training.optim import QGaLoreAdamW8bit, fold_after

KINDS = ("int4", "q-galore", "galore", "qa-lora")
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))


def prepared(kind):
    """A model in training: 12 -> 64 -> 31 -> 8; 31 rows are no even split."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 31), nn.Tanh(), nn.Linear(31, 8))
    if kind == "int4":
        model = nn.Sequential(nn.Linear(12, 12), *model)  # the first stays float
        qcompile.train(model, "int4-train", [X], progress=False)
    elif kind == "qa-lora":
        qcompile.quantize(model.eval(), "w4a16-g32", example=X, progress=False)
        qcompile.qa_lora(model, rank=4, alpha=8, example=X)
    else:
        config = FLOAT if kind == "galore" else {}
        recipe = qcompile.Recipe("test", (QGaLore(**{"rank": 4, "gap": 3, **config}),))
        qcompile.train(model, recipe, example=X, progress=False)
    return model.train()


def optimizer_of(kind, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "galore" in kind:
        return fold_after(torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0))
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trained(kind, model, batches, forward=None):
    """Five steps; the model."""
    optimizer = optimizer_of(kind, model)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(forward or model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def sharded(model):
    """Split each linear by itself, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model)[::2]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_state(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def _process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for kind in KINDS:
        batches = [data(2 * step + rank) for step in range(5)]
        model = prepared(kind)
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        by_ddp = trained(kind, model, batches, parallel).state_dict()
        by_shards = whole_state(trained(kind, sharded(prepared(kind)), batches))
        torch.save((by_ddp, by_shards), f"{folder}/{kind}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_if_the_model_was_whole(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    for kind in KINDS:
        by_ddp, by_shards = torch.load(tmp_path / f"{kind}-0.pt")
        assert by_ddp.keys() == by_shards.keys()
        assert all(torch.equal(by_ddp[name], by_shards[name]) for name in by_ddp), kind
        model = prepared(kind)
        model.load_state_dict(by_shards)
        if kind in ("galore", "qa-lora"):  # the others round the gradients or weights of one process by other draws
            batches = [data(2 * step) for step in range(5)], [data(2 * step + 1) for step in range(5)]
            both = [tuple(torch.cat(pair) for pair in zip(*pair, strict=True)) for pair in zip(*batches, strict=True)]
            single = trained(kind, prepared(kind), both).state_dict()
            assert all(torch.allclose(single[name], by_shards[name], atol=1e-5) for name in single), kind
        qcompile.settle(model)  # the state of shards settles in a model that is whole
        assert torch.isfinite(model(X)).all()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_trains_as_without_shards_and_settles_the_whole_state(kind, one_process):
    batches = [data(step) for step in range(5)]
    whole, model = trained(kind, prepared(kind), batches), trained(kind, sharded(prepared(kind)), batches)
    state = whole_state(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    with pytest.raises(RecipeError, match="is a shard .*Fix: read the whole state .*full_state_dict=True"):
        qcompile.settle(model)
    again = prepared(kind)
    again.load_state_dict(state)
    for settled in (whole, again):
        qcompile.settle(settled)
    assert torch.equal(whole.eval()(X), again.eval()(X))


def test_what_is_sharded_already_is_refused(one_process):
    def model():
        return sharded(nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 8)))

    fix = "is a shard .*Fix: prepare the whole model, then shard it, then make the optimizer"
    with pytest.raises(RecipeError, match=fix):
        qcompile.train(model(), "int4-train", example=X, progress=False)
    with pytest.raises(RecipeError, match=fix):
        qcompile.qa_lora(model(), rank=4, example=X)
    with pytest.raises(ValueError, match="QGaLoreAdamW8bit takes no parameters that are sharded .*Fix: .*fold_after"):
        QGaLoreAdamW8bit(sharded(prepared("q-galore")).parameters())


def test_a_step_of_shards_without_a_fold_is_an_error(one_process):
    model = sharded(prepared("q-galore"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, data(0)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="the optimizer stepped without a fold"):
        model(X)


def test_a_step_of_shards_with_nan_changes_nothing(one_process):
    model = sharded(prepared("q-galore"))
    optimizer = optimizer_of("q-galore", model)
    before = {name: tensor.clone() for name, tensor in whole_state(model).items() if "codes" in name}
    loss_of(model, data(0)).backward()
    model[0].low.grad.to_local().fill_(torch.nan)
    with pytest.raises(ValueError, match="1 of 2 weights.*holds NaN or Inf"):
        optimizer.step()
    after = whole_state(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
