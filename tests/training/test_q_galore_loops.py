"""What training loops do with optimizers of Q-GaLore: accumulate, resume, compile, clip, scale and schedule."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from q_galore_models import (
    FLOAT,
    adamw,
    data,
    eight_bits,
    equal_states,
    loss_of,
    net,
    prepared,
    steps,
    weights,
)  # fmt: skip
from torch import nn

from qcompile.ir.projected_gradient_op import REFRESHES, STEP

DOUBLE = dict(dtype=torch.float64)
BOTH = pytest.mark.parametrize("optimizer_of", [adamw, eight_bits])


@pytest.mark.parametrize("config", [FLOAT, {}])
def test_micro_batches_add_up_to_the_batch(config):
    """At one basis: it comes from the first micro-batch, and stays until the step."""
    parts, whole = prepared(net(**DOUBLE), **config), prepared(net(**DOUBLE), **config)
    batches = [data(step, **DOUBLE) for step in range(4)]
    for batch in batches:
        loss_of(parts, batch, 1 / 4).backward()
    loss_of(whole, batches[0]).backward()  # for its basis
    whole.zero_grad()
    loss_of(whole, tuple(torch.cat(t) for t in zip(*batches, strict=True))).backward()
    assert equal_states(parts, whole) and parts[0].schedule[REFRESHES] == 1
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-14)


@BOTH
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_is_bit_for_bit(optimizer_of, accumulate):
    def start():
        model = prepared(net((12, 512, 16, 8)), rank=8)
        return model, optimizer_of(model)

    whole, optimizer = start()
    steps(whole, optimizer, 0, 8, accumulate=accumulate)
    model, optimizer = start()
    steps(model, optimizer, 0, 4, accumulate=accumulate)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(77)  # nothing is drawn from the global generator
    model, optimizer = start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(model, optimizer, 4, 8, accumulate=accumulate)
    assert equal_states(model, whole)


def test_nothing_is_drawn_from_the_global_generator():
    model = prepared(net())
    before = torch.get_rng_state()
    steps(model, eight_bits(model), 0, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_aot_eager_trains_as_eager_does(checkpointing):
    def forward(model):
        if not checkpointing:
            return model
        return lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    eager, compiled = prepared(net()), prepared(net())
    steps(eager, adamw(eager), 0, 7)
    steps(compiled, adamw(compiled), 0, 7, forward=torch.compile(forward(compiled), backend="aot_eager"))
    assert equal_states(eager, compiled) and compiled[0].schedule.tolist()[:3] == [7, 3, 3]


@pytest.mark.slow
def test_inductor_trains_as_eager_does():
    """Float weights: last bits of compiled products flip stochastic draws, whose effect is a code each."""
    eager, compiled = (prepared(net(), weight=None) for _ in range(2))
    steps(eager, adamw(eager), 0, 7)
    steps(compiled, adamw(compiled), 0, 7, forward=torch.compile(compiled, dynamic=True))
    assert compiled[0].schedule.tolist() == eager[0].schedule.tolist()
    for a, b in zip(weights(eager), weights(compiled), strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def test_a_compiled_step_without_a_fold_is_noticed():
    model = prepared(net())
    forward = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, 0, 1, forward=forward)
    with pytest.raises(ValueError, match=r"stepped without a fold.*qcompile.optim.fold_after\(optimizer\)"):
        forward(data(1)[0])


@BOTH
def test_clipping_sees_all_gradients(optimizer_of):
    """The norm of dL is at most that of the weight's gradient, and a clipped step is the step of clipped gradients."""
    model, plain = prepared(net(), **FLOAT), net()
    loss_of(model, data(0)).backward()
    loss_of(plain, data(0)).backward()
    for module, linear in ((model[0], plain[0]), (model[2], plain[2])):
        assert 0 < module.low.grad.norm() <= linear.weight.grad.norm() * (1 + 1e-6)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float(norm) > 0.01
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert total == pytest.approx(0.01, rel=1e-3)
    optimizer_of(model).step()
    assert model[0].schedule[STEP] == 1


@BOTH
def test_grad_scaler(optimizer_of):
    """Powers of two change nothing; a step that overflows is skipped, and its basis is looked for again."""
    scaled, plain = prepared(net()), prepared(net())
    optimizer = optimizer_of(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    start = copy.deepcopy(scaled.state_dict())
    x, labels = data(0)
    scaler.scale(loss_of(scaled, (x, labels), float("inf"))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(start[name], tensor) for name, tensor in scaled.state_dict().items())
    other = optimizer_of(plain)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, data(step))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        loss_of(plain, data(step)).backward()
        other.step()
    assert equal_states(scaled, plain)


def test_a_scheduler_sets_the_rate_of_the_decay():
    model = prepared(net(), **FLOAT)
    optimizer = adamw(model, lr=0.5, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = weights(model)
    steps(model, optimizer, 0, 1)
    scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_step_that_a_scaler_skips_folds_nothing():
    """GradScaler tells a fused optimizer by `found_inf`, and its step hook runs all the same."""
    model = prepared(net())
    optimizer = adamw(model, weight_decay=0.1, fused=True)
    loss_of(model, data(0)).backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.step()
    assert any(not torch.equal(model.state_dict()[name], before[name]) for name in before)
