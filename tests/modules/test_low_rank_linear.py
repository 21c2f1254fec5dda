"""LowRankLinear: folds, casts, copies, state; what it settles to."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from q_galore_models import FLOAT, data, equal_states, loss_of, low_rank_linears, net, prepared, state
from torch import nn

from qcompile.ir.projected_gradient_op import DUE, STEP
from qcompile.modules.low_rank_linear import _LIVE, modules_of
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.low_rank import expand


def trained(**config):
    """A prepared model after one backward, so that it has bases."""
    model = prepared(net(), **config)
    loss_of(model, data(0)).backward()
    return model


def basis_of(module):
    form = module.rule.basis_format
    if form is None:
        return module.basis
    length = module.first.shape[0]
    return torch.ops.qcompile.dequantize(
        module.basis, module.basis_scale, module.basis_zero, None, str(form), length, torch.float32
    )


@pytest.mark.parametrize("given_step", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_fold_in_float_is_the_step_in_the_basis(given_step, decay):
    for module in low_rank_linears(trained(**FLOAT, scale=0.5)):
        step, before = torch.randn_like(module.low), module.weight.clone()
        if not given_step:
            module.low.data.copy_(step)
        module.fold(decay, step if given_step else None)
        expected = before * (1 - decay) + 0.5 * expand(step, module.basis, module.left)
        assert torch.allclose(module.weight, expected, atol=1e-6) and not module.low.any()
        assert module.schedule[STEP] == 1


def test_a_fold_in_int8_is_within_a_scale_and_counts_its_draws():
    module = low_rank_linears(trained())[0]
    step, before = 0.1 * torch.randn_like(module.low), module.weight.clone()
    copied = copy.deepcopy(module)
    module.fold(step=step)
    expected = before + 0.25 * expand(step, basis_of(module), module.left)
    assert bool(((module.weight - expected).abs() <= module.scale * 1.01).all())
    copied.fold(step=step)
    assert torch.equal(copied.codes, module.codes)
    again = copy.deepcopy(copied)
    again.schedule[STEP] = 0
    copied.fold(step=step)
    again.fold(step=step)
    assert not torch.equal(copied.codes, again.codes), "each step has draws of its own"


def test_sites_draw_independently():
    a, b = low_rank_linears(prepared(net((16, 16, 16, 8))))
    assert a.rule.stream != b.rule.stream
    loss_of(nn.Sequential(a, b), (torch.randn(4, 16), torch.randint(0, 16, (4,)))).backward()
    b.load_state_dict(a.state_dict())
    for module in (a, b):
        module.fold(step=torch.full_like(module.low, 0.01))
    assert not torch.equal(a.codes, b.codes)


def test_no_step_leaves_the_codes():
    for module in low_rank_linears(trained()):
        before = [t.clone() for t in (module.codes, module.scale, module.zero)]
        module.fold()
        assert all(torch.equal(a, b) for a, b in zip(before, (module.codes, module.scale, module.zero), strict=True))


@pytest.mark.parametrize("given_step", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(given_step):
    module = low_rank_linears(trained())[0]
    before = [t.clone() for t in module.state_dict().values()]
    step = torch.full_like(module.low, float("nan"))
    if not given_step:
        module.low.data.copy_(step)
    with pytest.raises(ValueError, match="holds NaN or Inf.*GradScaler"):
        module.fold(step=step if given_step else None)
    assert all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))


def test_a_basis_is_due_each_gap_steps():
    module = low_rank_linears(trained())[0]  # with a gap of 3
    due = []
    for _ in range(7):
        module.fold()
        due.append(int(module.schedule[DUE]))
        module.schedule[DUE] = 0
    assert due == [0, 0, 1, 0, 0, 1, 0]


def test_what_it_computes_is_its_weight_and_settled_the_same():
    model = prepared(net())
    for module in low_rank_linears(model):
        x = torch.randn(3, module.in_features)
        expected = nn.functional.linear(x, module.weight, module.bias)
        settled = module.settled()
        assert isinstance(settled, QuantLinear) and str(settled.format) == "int8/group256/zero"
        assert torch.allclose(module(x), expected, atol=1e-6) and torch.allclose(settled(x), expected, atol=1e-6)


def test_a_float_one_settles_to_a_linear():
    module = low_rank_linears(trained(**FLOAT))[0]
    settled, x = module.settled(), torch.randn(3, 12)
    assert type(settled) is nn.Linear and torch.equal(settled(x), module(x)) and not settled.weight.requires_grad


def test_an_unfolded_step_is_neither_settled_nor_saved():
    module = low_rank_linears(trained())[0]
    module.low.data.fill_(0.1)
    for attempt in (module.settled, module.state_dict, lambda: module(torch.randn(2, 12))):
        with pytest.raises(ValueError, match="stepped without a fold"):
            attempt()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_the_state(cast):
    model = trained()
    before = [t.clone() for module in low_rank_linears(model) for t in module.buffers()]
    model.to(cast)
    after = [t for module in low_rank_linears(model) for t in module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for module in low_rank_linears(model):
        assert module.low.dtype == torch.float32 == module.low.grad.dtype and module.bias.dtype == cast
        out = module(torch.randn(2, module.in_features, dtype=cast))
        assert out.dtype == cast


def test_autocast():
    model = prepared(net())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 12))
        assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(m.low.grad.dtype == torch.float32 and m.low.grad.any() for m in low_rank_linears(model))


def test_its_state_goes_through_a_file():
    model, other = trained(), prepared(net(seed=5))
    names = set(model.state_dict())
    assert not any(name.endswith("low") for name in names) and "0.bias" in names and "0.codes" in names
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other[0].low.data.fill_(1.0)  # of a step that the state replaces
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert equal_states(model, other) and not other[0].low.any()


def test_another_format_is_refused():
    with pytest.raises(RuntimeError, match="must be torch.float32: it is of another format"):
        prepared(net(), **FLOAT).load_state_dict(prepared(net(), weight="int8/row").state_dict(), strict=False)


def test_copies_are_found_and_forgotten():
    model = prepared(net())
    copied = copy.deepcopy(model)
    found = modules_of([*model.parameters(), *copied.parameters()])
    assert set(map(id, found.values())) == {id(m) for m in [*low_rank_linears(model), *low_rank_linears(copied)]}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert len(modules_of(loaded.parameters())) == 2
    gc.collect()
    count = len(_LIVE)
    del copied, loaded, found
    gc.collect()
    assert len(_LIVE) == count - 4


def test_zeros_need_no_memory():
    module = low_rank_linears(prepared(net()))[0]
    module.free_low()
    assert module.low.untyped_storage().nbytes() == 4 and module.low.shape == (20, 4)
    loss_of(module, (torch.randn(4, 12), torch.randint(0, 20, (4,)))).backward()
    assert module.low.grad.shape == (20, 4) and module.low.grad.is_contiguous()
    module.load_state_dict(copy.deepcopy(module).state_dict())
    module.hold_low()
    assert module.low.untyped_storage().nbytes() == 4 * 20 * 4


def test_the_weight_cannot_be_written():
    module = low_rank_linears(prepared(net()))[0]
    with pytest.raises(ValueError, match="would have no effect"):
        module.weight.mul_(2)
    assert "rank=4, weight=int8/group256/zero, basis=int4/group256/zero" in repr(module)
    assert len(state(module)) == 10
