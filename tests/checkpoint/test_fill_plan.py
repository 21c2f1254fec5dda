"""A checkpoint goes into a float model as a whole, or the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qcompile
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.fill_plan import FillPlan
from qcompile.checkpoint.folder_meta import FolderMeta
from qcompile.checkpoint.model_state import ModelState, slots


def float_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)).eval()


def state_of(recipe="w8a16"):
    model = float_model()
    qcompile.quantize(model, recipe, example=torch.randn(4, 32), progress=False)
    return model, ModelState.of(model)


def meta_of(state, **changes):
    return FolderMeta(None, "M", changes.pop("shared", state.shared), changes.pop("modules", state.modules), **changes)


def assert_refused(target, meta, tensors, words, tmp_path):
    before = {name: (slot.tensor, slot.tensor.clone()) for name, slot in slots(target).items()}
    kinds = [type(module) for module in target.modules()]
    with pytest.raises(CheckpointError, match=words):
        FillPlan.of(target, meta, tensors, tmp_path)
    assert [type(module) for module in target.modules()] == kinds and slots(target).keys() == before.keys()
    for name, slot in slots(target).items():
        same, content = before[name]
        assert slot.tensor is same and torch.equal(slot.tensor, content)


def test_it_fills_what_is_there(tmp_path):
    model, state = state_of()
    target = float_model()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    FillPlan.of(target, meta_of(state), state.tensors, tmp_path).apply()
    x = torch.randn(3, 32)
    assert torch.equal(target.eval()(x), model(x)) and ModelState.of(target).tensors.keys() == state.tensors.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"1.weight": None}, r"missing \['1.weight'\]"),
        ({"1.running_mean": None}, r"missing \['1.running_mean'\]"),
        ({"1.weight": torch.ones(31)}, r"of another shape or dtype \['1.weight'\]"),
        ({"1.weight": torch.ones(32).int()}, r"of another shape or dtype \['1.weight'\]"),
        ({"1.num_batches_tracked": torch.tensor(1.0)}, r"of another shape or dtype \['1.num_batches_tracked'\]"),
        ({"2.weight": torch.ones(3)}, r"unknown \['2.weight'\]"),
        ({"1.x.bias": torch.ones(3)}, r"unknown \['1.x.bias'\]"),
        ({"2.bias": torch.ones(3)}, r"unknown \['2.bias'\]"),
        ({"0.scale": torch.zeros(32, 1)}, "'0.scale' holds scales that are not finite and positive"),
        ({"0.codes": None}, "'0' has the tensors"),
    ],
)
def test_other_tensors_are_named_and_nothing_is_changed(change, words, tmp_path):
    _, state = state_of()
    tensors = {name: tensor for name, tensor in {**state.tensors, **change}.items() if tensor is not None}
    assert_refused(float_model(), meta_of(state), tensors, words, tmp_path)


@pytest.mark.parametrize("path", ["", "9", "0.x", "x.y"])
def test_entries_need_a_place(path, tmp_path):
    _, state = state_of()
    modules = {path: state.modules["0"], "3": state.modules["3"]}
    assert_refused(float_model(), meta_of(state, modules=modules), state.tensors, "is no module", tmp_path)


@pytest.mark.parametrize(
    "entry", [{"kind": "Alias", "of": "9"}, {"kind": "Alias"}, {"kind": "Alias", "of": ["0"]}, {"kind": "Centers"},
              {"kind": "QuantStack"}, {}]
)  # fmt: skip
def test_entries_that_lead_nowhere(entry, tmp_path):
    _, state = state_of()
    assert_refused(float_model(), meta_of(state, modules={**state.modules, "2": entry}), state.tensors, "'2'", tmp_path)


def test_ties_that_lead_nowhere(tmp_path):
    _, state = state_of()
    for shared in ({"1.weight": "0.x"}, {"1.weight": "1.bias"}):
        assert_refused(float_model(), meta_of(state, shared=shared), state.tensors, "is said to be tied", tmp_path)


def test_a_quantized_model_is_not_filled_again(tmp_path):
    model, state = state_of()
    assert_refused(copy.deepcopy(model), meta_of(state), state.tensors, "is quantized already .'0'", tmp_path)


def test_tied_tensors_are_one_parameter(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    state = ModelState.of(model)
    target = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    FillPlan.of(target, meta_of(state), state.tensors, tmp_path).apply()
    assert target[0].weight is target[1].weight


def test_a_module_that_was_saved_as_two_does_not_fit_one(tmp_path):
    state = ModelState.of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    one = nn.Linear(8, 8)
    assert_refused(nn.Sequential(one, one), meta_of(state), state.tensors, "two tensors for one place", tmp_path)


def test_layers_that_are_shared_come_back_shared(tmp_path):
    def shared():
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        return nn.Sequential(layer, layer, nn.Linear(32, 8)).eval()

    model, x = shared(), torch.randn(3, 32)
    qcompile.quantize(model, "w8a16", example=x, progress=False)
    state = ModelState.of(model)
    for target in (shared(), nn.Sequential(*(copy.deepcopy(layer) for layer in shared()))):
        FillPlan.of(target, meta_of(state), state.tensors, tmp_path).apply()
        assert torch.equal(target.eval()(x), model(x)) and target[0][0] is target[1][0]


def test_computed_tensors_may_have_grown_or_be_new(tmp_path):
    def model():
        result = nn.Sequential(nn.Linear(4, 4))
        result[0].register_buffer("table", torch.ones(3), persistent=False)
        return result

    source = model()
    source[0].table = torch.arange(5.0).bfloat16()
    source[0].register_buffer("late", torch.ones(2), persistent=False)
    state, target = ModelState.of(source), model()
    FillPlan.of(target, meta_of(state, computed=frozenset(state.computed)), state.tensors, tmp_path).apply()
    assert torch.equal(target[0].table, source[0].table) and target[0].table.dtype == torch.bfloat16
    assert torch.equal(target[0].late, torch.ones(2)) and "0.late" not in target.state_dict()
