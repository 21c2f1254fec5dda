"""Everything that a model computes with is collected: computed buffers, attributes, ties, shared modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.model_state import ModelState, apply_scalars, slots
from qcompile.checkpoint.save_load import load, save
from qcompile.modules.quant_linear import QuantLinear, RotatedLinear
from qcompile.modules.wrappers import unwrapped
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("inverse", torch.arange(3.0), persistent=False)
        self.plain, self.length, self.name, self._hidden = torch.ones(2), 7, "x", 3


def quant_linear(signs=None):
    form = Format("int8")
    parts = dict(zip(PARTS, quantize_tensor(torch.randn(8, 8), form).stored_parts, strict=True))
    return QuantLinear(8, 8, form, None, {**parts, "signs": signs})


def test_computed_tensors_and_the_scalars_beside_them():
    model = nn.Sequential(Table(), Table())
    state = ModelState.of(model)
    assert set(state.tensors) == {"0.mean", "0.inverse", "0.plain", "1.mean"}
    assert state.shared == {"1.inverse": "0.inverse", "1.plain": "0.plain"}  # of the same content
    assert sorted(state.computed) == ["0.inverse", "0.plain", "1.inverse", "1.plain"]
    assert state.scalars == {"0": {"length": 7}, "1": {"length": 7}}
    model[1].length = 9
    apply_scalars(model, {"1": {"length": 5, "unknown": 1, "name": 3}, "9": {"length": 1}})
    assert model[1].length == 5 and model[1].name == "x" and not hasattr(model[1], "unknown")


def test_ties_are_told_by_memory_and_not_by_addresses():
    first, second, third = (nn.Linear(4, 4, bias=False) for _ in range(3))
    second.weight = first.weight
    third.weight = nn.Parameter(first.weight.detach().t())
    state = ModelState.of(nn.Sequential(first, second, third))
    assert set(state.tensors) == {"0.weight", "2.weight"} and state.shared == {"1.weight": "0.weight"}
    assert torch.equal(state.tensors["2.weight"], first.weight.t())
    empty = nn.ParameterList([torch.ones(0, 3), torch.ones(0, 3)])  # both have the address 0
    assert not ModelState.of(empty).shared


def test_sites_never_share_a_tensor():
    signs = torch.ones(8)
    model = nn.Sequential(quant_linear(signs), quant_linear(signs), RotatedLinear(nn.Linear(8, 8), signs))
    state = ModelState.of(model)
    assert not state.shared and {"0.signs", "1.signs", "2.signs"} <= set(state.tensors)
    assert len({t.untyped_storage().data_ptr() for t in state.tensors.values()}) == len(state.tensors)


def test_a_module_in_two_places_is_stored_once():
    one = quant_linear()
    state = ModelState.of(nn.ModuleDict({"a": one, "b": nn.Sequential(one)}))
    assert state.modules["b.0"] == {"kind": "Alias", "of": "a"} and all(name.startswith("a.") for name in state.tensors)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_leave_no_trace_in_names(wrap):
    inner = nn.Linear(3, 3)
    assert unwrapped(nn.DataParallel(wrap(inner))) is inner
    assert set(slots(nn.Sequential(torch.compile(inner, backend="eager")))) == {"0.weight", "0.bias"}


class Angles(nn.Module):
    """Complex rotary angles, with views of the same memory whose signs are only noted."""

    def __init__(self, dtype=torch.complex64):
        super().__init__()
        self.register_buffer("angles", torch.randn(3, 2, dtype=dtype), persistent=False)
        self.register_buffer("back", self.angles.conj())
        self.register_buffer("negative", self.back.imag)


def test_complex_tensors_and_views_with_a_noted_sign(tmp_path):
    model, other = Angles(), Angles()
    assert model.back.is_conj() and model.negative.is_neg()
    save(model, tmp_path / "saved")
    load(tmp_path / "saved", other)
    for name, buffer in model.named_buffers():
        assert torch.equal(getattr(other, name), buffer), name


class WithState(nn.Linear):
    def get_extra_state(self):
        return 3


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(2, 2, device="meta")), "'0.weight' has no values .it is on the meta device"),
        (nn.Sequential(WithState(2, 2)), "'0' .WithState. has an extra state"),
        (nn.Sequential(nn.LazyLinear(2)), "'0.weight' is a UninitializedParameter"),
        (Angles(torch.complex128), "'angles' is torch.complex128, .* Fix: make it torch.complex64"),
    ],
)
def test_what_cannot_be_stored_is_named(model, words):
    with pytest.raises(CheckpointError, match=words):
        ModelState.of(model)
