"""Training in fixed point as users do it: compiled, checkpointed, resumed, scaled, in several processes."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import qcompile
from qcompile.modules.fixed_point_modules import FixedPointModule
from qcompile.passes import FixedPoint

ALL = qcompile.Recipe("all", (FixedPoint(keep_first=False, keep_last=False),))


class Net(nn.Module):
    """A convolution between others and linears, with batch norm and dropout left to the caller."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.inner, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.checkpointed = False

    def features(self, x):
        return F.relu(self.conv(F.relu(self.stem(x)))).mean(-1)

    def forward(self, x):
        x = checkpoint(self.features, x, use_reentrant=False) if self.checkpointed else self.features(x)
        return self.head(torch.tanh(self.inner(x)))


def batch(seed=0, count=32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 16, generator=generator)
    return x, (x.mean((1, 2)) > 0).long()


def prepared(recipe="int4-train", model=None):
    torch.manual_seed(0)
    model = model or Net()
    qcompile.train(model, recipe, example=batch()[0], progress=False)
    return model.train()


def step(model, call=None, seed=0, scale=1.0):
    """One backward pass; the loss."""
    x, y = batch(seed)
    loss = F.cross_entropy((model if call is None else call)(x), y) * scale
    loss.backward()
    return loss.detach()


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_settles():
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for number in range(80):
        losses.append(float(step(model, seed=number % 4)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 0.6 and sum(losses[-4:]) / 4 < 0.25
    model.eval()
    x, y = batch(9, 256)
    before = model(x)
    assert float((before.argmax(1) == y).float().mean()) > 0.9
    qcompile.settle(model)
    assert torch.equal(model(x), before) and not any(isinstance(m, FixedPointModule) for m in model.modules())


class Products(nn.Module):
    """Only fixed-point products: what lies between them rounds in Inductor as in eager mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv1d(1, 4, 3), nn.Linear(14, 8)

    def forward(self, x):
        return self.inner(self.conv(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_eager_bit_for_bit(backend):
    eager, compiled = prepared(ALL, Products()), prepared(ALL, Products())
    call = torch.compile(compiled, backend=backend, fullgraph=True)
    assert all(isinstance(module, FixedPointModule) for module in (compiled.conv, compiled.inner))
    x = batch()[0]
    for _ in range(3):
        for run in (eager, call):
            run(x).sum().backward()
        assert equal(gradients(eager), gradients(compiled)) and equal(states(eager), states(compiled))
    assert int(compiled.inner.counter) == 3


def test_dynamic_shapes_compile_once():
    eager, compiled = prepared(ALL, Products()), prepared(ALL, Products())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, backend=counter, dynamic=True)
    for count in (8, 12, 20):
        x = batch(0, count)[0]
        for run in (eager, call):
            run(x).sum().backward()
    assert counter.frame_count == 1
    assert equal(gradients(eager), gradients(compiled)) and equal(states(eager), states(compiled))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_activation_checkpointing_gives_the_same_gradients_and_one_update(backend):
    plain, other = prepared(), prepared()
    other.checkpointed = True
    call = torch.compile(other, backend=backend) if backend else other
    for _ in range(2):
        step(plain)
        step(other, call)
    assert int(other.conv.counter) == 2
    assert equal(states(plain), states(other)) and equal(gradients(plain), gradients(other))


def test_a_resumed_run_is_the_uninterrupted_one():
    def run(model, optimizer, steps):
        for number in steps:
            step(model, seed=number)
            optimizer.step()
            optimizer.zero_grad()

    whole = prepared()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    run(whole, optimizer, range(3))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    run(whole, optimizer, range(3, 6))
    resumed = prepared()
    again = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.manual_seed(99)  # the state of the generator plays no part
    run(resumed, again, range(3, 6))
    assert equal(states(whole), states(resumed))


def test_another_seed_rounds_otherwise():
    found = []
    for seed in (0, 0, 1):
        model = prepared(qcompile.Recipe("seed", (FixedPoint(seed=seed),)))
        step(model)
        found.append(model.conv.weight.grad)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_accumulation_moves_gamma_once_a_backward():
    model = prepared()
    step(model)
    before = float(model.conv.gamma)
    losses = [F.cross_entropy(model(x), y) for x, y in (batch(1), batch(2))]
    for number, loss in enumerate(losses, 2):
        loss.backward()
        assert int(model.conv.counter) == number
    assert abs(float(model.conv.gamma) - before) < 2.1e-3


def test_a_scaled_loss_changes_no_code():
    plain, scaled = prepared(), prepared()
    step(plain)
    step(scaled, scale=2.0**12)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient * 2.0**12, gradients(scaled)[name]), name
    assert equal(states(plain), states(scaled))


def test_an_overflow_is_skipped_by_the_scaler_and_leaves_the_interval():
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number, factor in enumerate((1.0, math.inf, 1.0)):
        before = states(model)
        x, y = batch(number)
        scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = states(model)
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        if math.isinf(factor):
            assert {name.rpartition(".")[2] for name in moved} == {"counter"}
        else:
            assert {"conv.weight", "conv.counter", "inner.act_range"} <= moved
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autocast(backend):
    model = prepared()
    call = torch.compile(model, backend=backend) if backend else model
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(x)
        assert out.dtype == torch.bfloat16
        loss = F.cross_entropy(out.float(), y)
    loss.backward()
    assert model.conv.weight.grad.dtype == torch.float32
    assert float(model.conv.weight.grad.abs().sum()) > 0 and int(model.conv.counter) == 1


@pytest.mark.slow
def test_the_backend_compiles_a_model_in_training():
    eager, compiled = prepared(), prepared()
    call = torch.compile(compiled, backend="qcompile")
    step(eager)
    step(compiled, call)
    assert int(compiled.conv.counter) == 1
    for name, gradient in gradients(eager).items():
        assert float((gradient - gradients(compiled)[name]).norm() / gradient.norm()) < 0.2, name


def test_what_is_prepared_is_refused_by_others(tmp_path):
    model = prepared()
    with pytest.raises(qcompile.RecipeError, match="in training already"):
        qcompile.train(model, "int4-train", example=batch()[0])
    with pytest.raises(ValueError, match="in training"):
        qcompile.quantize(model, "int8", example=batch()[0])
    with pytest.raises(qcompile.RecipeError, match="conv.*has not trained yet.*Fix"):
        qcompile.settle(model)
    assert isinstance(model.conv, FixedPointModule)


def test_a_small_language_model_trains():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    report = qcompile.train(model, "int4-train", progress=False)
    assert len(report.passes[0].done) == 14  # all but the logits
    ids = torch.randint(0, 64, (4, 1)).repeat(1, 16)  # each token again and again
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        qcompile.settle(model)
        assert torch.equal(model(input_ids=ids).logits, before)


def _process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = prepared()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(4):
        step(model, parallel, seed=2 * number + rank)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(states(model), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_one_model(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    trained = [name for name in one if name.endswith(("weight", "bias"))]
    assert all(torch.equal(one[name], two[name]) for name in trained)
    assert int(one["conv.counter"]) == int(two["conv.counter"]) == 4
    assert abs(float(one["conv.gamma"]) - float(two["conv.gamma"])) < 3e-3
