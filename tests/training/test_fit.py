"""A run of training: the loss falls, a killed run goes on bit for bit, and what cannot be trained is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import get_peft_model
from zoo import build

import qcompile
from qcompile.training.fit import CURVE, LOSSES, Fit, held_out_loss, newest_checkpoint, plot_losses

WINDOWS = [torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


@pytest.fixture(scope="module")
def base():
    model = build("llama")
    qcompile.quantize(model, "w4a16-g32", progress=False)
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adapted(base):
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(base[0]), qcompile.peft_config(base[0], 4, 8, task_type="CAUSAL_LM"))


def adapters(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}


def test_a_killed_run_goes_on_bit_for_bit(base, tmp_path):
    fit = Fit(steps=6, lr=1e-2, batch=2, accumulate=2, save_every=2)
    whole = adapted(base)
    before = held_out_loss(whole, WINDOWS)
    losses = fit.run(whole, WINDOWS, tmp_path / "whole")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6] and held_out_loss(whole, WINDOWS) < before - 0.01
    assert json.loads((tmp_path / "whole" / LOSSES).read_text())[0] == {"step": 1, "loss": losses[0][1]}

    def kill(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    killed = adapted(base)
    with pytest.raises(KeyboardInterrupt):
        fit.run(killed, WINDOWS, tmp_path / "killed", tell_step=kill)
    assert newest_checkpoint(tmp_path / "killed").name == "checkpoint-2"
    resumed = adapted(base)
    again = fit.run(resumed, WINDOWS, tmp_path / "killed", resume=True)
    assert [loss for _, loss in again] == [loss for _, loss in losses]
    for name, tensor in adapters(whole).items():
        assert torch.equal(tensor, adapters(resumed)[name]), name


def test_the_rate_warms_up_and_falls_to_a_tenth():
    fit = Fit(steps=100)
    shares = [fit._share_of_lr(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == 1.0 and shares[10] == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.1, abs=0.01) and all(
        a >= b for a, b in zip(shares[10:], shares[11:], strict=False)
    )


def test_what_cannot_be_trained_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        Fit().run(base[0], WINDOWS, tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint to go on from"):
        Fit().run(adapted(base), WINDOWS, tmp_path, resume=True)


def test_an_optimizer_of_ones_own(base, tmp_path):
    made = []

    def make(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.5))
        return made[0]

    Fit(steps=1, batch=2).run(adapted(base), WINDOWS, tmp_path, make_optimizer=make)
    assert len(made) == 1 and made[0].param_groups[0]["params"]


def test_checkpoints_are_ordered_by_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").touch()
    (tmp_path / "checkpoint-12").mkdir()  # killed while it was written
    assert newest_checkpoint(tmp_path).name == "checkpoint-10" and newest_checkpoint(tmp_path / "none") is None


def test_the_curve_is_drawn(tmp_path):
    plot_losses([(step, 3 / step) for step in range(1, 30)], tmp_path / CURVE)
    assert (tmp_path / CURVE).read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint_of_it(base, tmp_path):
    fit = Fit(steps=6, lr=1e30, batch=2, save_every=1, clip=0.0)
    with pytest.raises(ValueError, match=r"the loss of step \d is (nan|inf). Fix: a smaller learning rate than 1e\+30"):
        fit.run(adapted(base), WINDOWS, tmp_path)
    last = newest_checkpoint(tmp_path)
    assert last is None or json.loads((last / "trainer_state.json").read_text())["log_history"][-1]["loss"] < 100
