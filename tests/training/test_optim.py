"""Optimizers of Q-GaLore: GaLore's step by any optimizer, 8-bit AdamW, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from q_galore_models import (
    FLOAT,
    GaLoreAdamW,
    adamw,
    data,
    eight_bits,
    loss_of,
    low_rank_linears,
    net,
    prepared,
    steps,
    weights,
)  # fmt: skip
from torch import nn
from torch._dynamo.utils import counters

from qcompile.ir import projected_gradient_op
from qcompile.ir.projected_gradient_op import REFRESHES, STEP
from qcompile.training import optim
from qcompile.training.optim import QGaLoreAdamW8bit, fold_after

DOUBLE = dict(dtype=torch.float64)


BOTH = pytest.mark.parametrize("optimizer_of", [adamw, eight_bits])


@given(
    widths=st.tuples(st.integers(4, 20), st.integers(4, 20), st.integers(4, 20)),
    gap=st.integers(1, 6),
    scale=st.sampled_from([0.25, 1.0]),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_law_f_it_is_galore(widths, gap, scale, decay):
    """With float weights and bases, any optimizer's folded step is GaLore's, over several bases and on both sides."""
    reference, ours = net((*widths, 8), **DOUBLE), net((*widths, 8), **DOUBLE)
    prepared(ours, **FLOAT, gap=gap, scale=scale)
    a = GaLoreAdamW(
        reference.parameters(), 1e-2, 4, gap, scale, [reference[0].weight, reference[2].weight], decay=decay
    )
    b = adamw(ours, weight_decay=decay)
    for step in range(12):
        for model, optimizer in ((reference, a), (ours, b)):
            optimizer.zero_grad()
            loss_of(model, data(step, columns=widths[0], **DOUBLE)).backward()
            optimizer.step()
    for mine, theirs in zip(weights(ours), weights(reference), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    assert ours[0].schedule[REFRESHES] == -(-12 // gap)


def test_law_f_against_galore_torch(monkeypatch):
    """Which decomposes float64 gradients in float32."""
    galore_torch = pytest.importorskip("galore_torch")
    original = projected_gradient_op.singular_basis
    in_float32 = lambda gradient, rank, left: original(gradient.float(), rank, left)  # noqa: E731
    monkeypatch.setattr(projected_gradient_op, "singular_basis", in_float32)
    reference, ours = net(**DOUBLE), net(**DOUBLE)
    prepared(ours, **FLOAT, gap=5)
    low = [reference[0].weight, reference[2].weight]
    rest = [p for p in reference.parameters() if all(p is not other for other in low)]
    group = {"params": low, "rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    options = dict(lr=1e-2, weight_decay=0.0, no_deprecation_warning=True)
    a = galore_torch.GaLoreAdamW([{"params": rest}, group], **options)
    b = fold_after(galore_torch.GaLoreAdamW(ours.parameters(), **options))
    for step in range(23):
        for model, optimizer in ((reference, a), (ours, b)):
            optimizer.zero_grad()
            loss_of(model, data(step, **DOUBLE)).backward()
            optimizer.step()
    for mine, theirs in zip(weights(ours), weights(reference), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-14)


@given(signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4))
def test_signs_of_singular_vectors_do_not_matter(signs):
    models = [prepared(net(), **FLOAT, gap=99) for _ in range(2)]
    for index, model in enumerate(models):
        loss_of(model, data(0)).backward()
        for module in low_rank_linears(model):
            module.basis.mul_(torch.tensor(signs)[:, None] ** index)
        steps(model, adamw(model), 0, 4)
    for a, b in zip(*map(weights, models), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@BOTH
def test_a_loss_falls(optimizer_of):
    model = prepared(net(), gap=20, scale=1.0)
    optimizer, batch = optimizer_of(model, lr=3e-2), data(0, rows=64)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and low_rank_linears(model)[0].schedule[STEP] == 60


def test_eight_bits_are_adamw_where_moments_are_small():
    """Fewer than 4096 values keep float32 moments: then it is torch's AdamW and a fold."""
    a, b = prepared(net()), prepared(net())
    steps(a, adamw(a, weight_decay=0.1), 0, 6)
    steps(b, eight_bits(b, weight_decay=0.1), 0, 6)
    for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    for mine, theirs in zip(weights(a), weights(b), strict=True):
        assert float((mine - theirs).abs().max()) < 0.02  # a code or two, where a last bit flipped a draw


def test_eight_bit_moments_stay_near_float_ones():
    wide = prepared(net((12, 1024, 64, 8)), rank=8, **FLOAT)
    other = copy.deepcopy(wide)
    optimizer = eight_bits(wide)
    start = weights(wide)
    steps(wide, optimizer, 0, 8)
    steps(other, adamw(other), 0, 8)
    moments = optimizer.state[wide[0].low]
    assert moments["exp_avg"].dtype == torch.uint8 and moments["exp_avg_scale"].shape == (1024 * 8 / 256,)
    moved = [(a - b).norm() for a, b in zip(weights(wide), start, strict=True)]
    apart = [(a - b).norm() for a, b in zip(weights(wide), weights(other), strict=True)]
    assert all(float(d) < 0.1 * float(m) for d, m in zip(apart, moved, strict=True))


def test_a_row_that_is_used_once_stays_near():
    """Its second moment is tiny beside its block's; as a zero it would be divided by."""
    torch.manual_seed(0)
    embedding = nn.Embedding(64, 128)
    model = nn.ModuleList([embedding, *prepared(net())])
    optimizer, start = eight_bits(model), embedding.weight.detach().clone()
    for step in range(12):
        optimizer.zero_grad()
        loss = 1e4 * embedding(torch.tensor([0])).sum() + (embedding(torch.tensor([1])).sum() if step < 3 else 0)
        loss.backward()
        optimizer.step()
    moved = (embedding.weight.detach() - start).abs().amax(1)
    assert 0 < float(moved[1]) < 12 * 1e-2 and not moved[2:].any()


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = prepared(net())
    optimizer = eight_bits(model)
    steps(model, optimizer, 0, 2)
    start, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    loss_of(model, data(2), float("nan")).backward()
    with pytest.raises(ValueError, match="NaN or Inf in .* gradients"):
        optimizer.step()
    assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], moments[index][name]) for name in state)


def test_a_layer_without_a_gradient_stays():
    model = prepared(net())
    optimizer = adamw(model, weight_decay=0.1)
    before = [t.clone() for t in model[2].state_dict().values()]
    model[0](data(0)[0]).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model[2].state_dict().values(), strict=True))
    assert model[0].schedule[STEP] == 1


def test_other_optimizers_fold_too():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for make in (
        lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=256),
        lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
    ):
        model = prepared(net((12, 128, 64, 8)), rank=8)
        before = weights(model)
        steps(model, fold_after(make(model.parameters())), 0, 3)
        assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert model[0].schedule[STEP] == 3


def test_freed_zeros_get_memory_for_another_optimizer():
    model = prepared(net())
    steps(model, eight_bits(model), 0, 1)
    assert model[0].low.untyped_storage().nbytes() == 4
    steps(model, adamw(model), 1, 3)
    assert model[0].schedule[STEP] == 3


def test_an_optimizer_made_before_train_is_named():
    model = net()
    early = torch.optim.AdamW(model.parameters())
    prepared(model)
    with pytest.raises(ValueError, match="this AdamW is a low-rank one.*made before qcompile.train"):
        fold_after(early)
    with pytest.raises(ValueError, match="this QGaLoreAdamW8bit is a low-rank one"):
        QGaLoreAdamW8bit(net().parameters())


def test_folding_twice_is_refused():
    model = prepared(net())
    for optimizer in (adamw(model), eight_bits(model)):
        with pytest.raises(ValueError, match="folds its steps already"):
            fold_after(optimizer)


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -0.1}])
def test_refused_options(option):
    with pytest.raises(ValueError, match=f"QGaLoreAdamW8bit: {next(iter(option))} is"):
        eight_bits(prepared(net()), **option)


def test_a_closure_and_groups_with_rates_of_their_own():
    model = prepared(net())
    low = [m.low for m in low_rank_linears(model)]
    rest = [p for p in model.parameters() if all(p is not other for other in low)]
    optimizer = QGaLoreAdamW8bit([{"params": rest, "lr": 0.0}, {"params": low}], lr=torch.tensor(1e-2))
    bias, codes = model[0].bias.clone(), model[0].codes.clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, data(0))
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert torch.equal(model[0].bias, bias) and not torch.equal(model[0].codes, codes)
    embedding = nn.Embedding(9, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer.add_param_group({"params": embedding.parameters()})
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_a_step_with_nan_changes_no_weight_and_leaves_a_model_that_runs():
    model = prepared(net())
    optimizer = adamw(model)
    loss_of(model, data(0)).backward()
    before = [m.codes.clone() for m in low_rank_linears(model)]
    low_rank_linears(model)[1].low.grad.fill_(float("nan"))
    with pytest.raises(ValueError, match="the optimizer's step for 1 of .* weights.*NaN or Inf.*No weight has changed"):
        optimizer.step()
    assert all(torch.equal(a, m.codes) for a, m in zip(before, low_rank_linears(model), strict=True))
    assert torch.isfinite(loss_of(model, data(1)))


def test_a_compiled_model_is_compiled_once():
    """The low-rank parameters have one layout from the first step on: else the second compiles all again."""
    counters.clear()
    torch._dynamo.reset()
    model = net()
    prepared(model)
    optimizer, compiled = eight_bits(model), torch.compile(model, backend="aot_eager")
    for step in range(3):
        optimizer.zero_grad()
        loss_of(compiled, data(step)).backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not any(module.low.any() or any(module.low.stride()) for module in low_rank_linears(model))


def test_with_a_process_group_parameters_stay_whole_until_the_first_step(monkeypatch):
    """DistributedDataParallel, which may be made later, copies the first process's values into them."""
    monkeypatch.setattr(optim, "_is_distributed", lambda: True)
    model = net()
    prepared(model)
    optimizer = eight_bits(model)
    optimizer.zero_grad()
    assert all(all(module.low.stride()) for module in low_rank_linears(model))
    loss_of(model, data(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not any(any(module.low.stride()) for module in low_rank_linears(model))
