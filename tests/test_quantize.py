"""In-place quantization, checkpoints, bad input: the model is as before or as asked, never between."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile import CalibrationError, CheckpointError, NothingToQuantize, QuantLinear, RecipeError, Rule
from qcompile.checkpoint import save_load
from qcompile.ir.program import Program
from qcompile.passes import Fuse, Quantize, SmoothQuant, Untie
from qcompile.passes.equivalent import smoothquant
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe


def quantized(name="llama", recipe="int8"):
    model = build(name)
    report = qcompile.quantize(model, recipe, [example(name)], progress=False)
    return model, report


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("recipe", ["int8", "int8-smooth", "w8a16", "w4a16", "w4a8", "fp8", "w4a4-rotated"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_in_place(name, recipe):
    reference = build(name)
    model, report = quantized(name, recipe)
    assert all(c.holds for c in report.certificates)
    assert report.bytes_after < report.bytes_before
    with torch.no_grad():
        got, want = model(**example(name))[0], reference(**example(name))[0]
    assert relative_error([got], [want]) < (0.03 if "8" in recipe and "w4" not in recipe else 0.5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "phi3", "gpt_neox"])
def test_exact_recipe_changes_nothing(name):
    reference = build(name)
    model, report = quantized(name, "exact")
    with torch.no_grad():
        assert relative_error([model(**example(name))[0]], [reference(**example(name))[0]]) < 1e-5
    assert {p.name for p in report.passes} == {"Untie", "FoldNorm", "Rotate", "OnlineHadamard"}


def test_model_keeps_its_manners():
    model, _ = quantized("llama", "w4a8")
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 8)
    scales = [m.scale.clone() for m in model.modules() if isinstance(m, QuantLinear)]
    model.to(torch.bfloat16)
    assert all(
        torch.equal(m.scale, s)
        for m, s in zip((m for m in model.modules() if isinstance(m, QuantLinear)), scales, strict=True)
    )
    assert model(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", ["int8", "w4a8", "w4a16", "fp8", "w4a4-rotated", "exact"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_save_and_load(name, recipe, tmp_path):
    model, _ = quantized(name, recipe)
    qcompile.save(model, tmp_path / "m")
    again = qcompile.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(**example(name))[0], model(**example(name))[0])
    assert json.loads((tmp_path / "m/qcompile.json").read_text())["recipe"]["name"] == recipe


def test_same_input_same_bytes(tmp_path):
    for part in "ab":
        model, _ = quantized("llama", "w4a4-rotated")
        qcompile.save(model, tmp_path / part)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "schema", "other model"])
def test_damaged_checkpoints(damage, tmp_path):
    model, _ = quantized()
    qcompile.save(model, tmp_path / "m")
    file, meta = tmp_path / "m/model.safetensors", tmp_path / "m/qcompile.json"
    target = None
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "foreign":
        file.write_bytes(b"not a tensor file at all")
    elif damage == "missing":
        meta.unlink()
    elif damage == "schema":
        meta.write_text('{"schema": 77}')
    else:
        target = build("opt")
        before = state(target)
    with pytest.raises(CheckpointError, match="m"):
        qcompile.load(tmp_path / "m", target)
    assert target is None or unchanged(target, before)


def test_full_folder_is_refused_and_nothing_is_half_written(tmp_path, monkeypatch):
    model, _ = quantized()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        qcompile.save(model, tmp_path / "full")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_load, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        qcompile.save(model, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["full"] and os.listdir(tmp_path / "full") == ["x"]


def test_nan_weight_is_named():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.model.layers[0].mlp.up_proj.weight[3, 4] = float("inf")
    before = state(model)
    with pytest.raises(RecipeError, match="2 sites.*layers.0.mlp.up_proj.weight.*layers.1.mlp.up_proj.weight"):
        qcompile.quantize(model, "int8", progress=False)
    assert [k for k, v in state(model).items() if not torch.equal(v, before[k])] == [
        k for k in before if before[k].isnan().any()
    ]


@pytest.mark.parametrize("data", ["none", "empty", "nan"])
def test_bad_calibration(data):
    model = build("vit")
    before = state(model)
    batches = {"none": None, "empty": iter(()), "nan": [{"pixel_values": torch.full((2, 3, 32, 32), float("nan"))}]}[
        data
    ]
    words = {"none": "Smooth .absmax.*Mend", "empty": "empty", "nan": "batch 1 brings NaN"}[data]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        qcompile.quantize(model, "int8-smooth", batches, progress=False)
    assert unchanged(model, before)


def test_interrupt_leaves_the_model(monkeypatch):
    model = build("llama")
    before = state(model)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Program, "watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qcompile.quantize(model, "int8-smooth", [example("llama")], progress=False)
    assert unchanged(model, before)


def test_rules():
    recipe = qcompile.find_recipe("int8").with_rules(
        [Rule("*.0.*", keep=True), Rule("*up_proj*", weight=qcompile.Format.parse("int4/group32"))]
    )
    model, report = build("llama"), None
    report = qcompile.quantize(model, recipe, progress=False)
    by_name = {s.name: s for s in report.sites}
    assert by_name["model.layers.0.mlp.up_proj.weight"].reason.startswith("kept float by the rule")
    assert by_name["model.layers.1.mlp.up_proj.weight"].weight == "int4/group32"
    with pytest.raises(RecipeError, match="matches no site; nearest names: .*up_proj"):
        qcompile.quantize(
            build("llama"), qcompile.find_recipe("int8").with_rules([Rule("*.upp_proj.*", keep=True)]), progress=False
        )


def test_a_model_without_sites():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x)

    with pytest.raises(NothingToQuantize, match="no linear"):
        qcompile.quantize(Norms(), "int8", example=torch.randn(2, 8), progress=False)


def test_missing_example_says_the_mend():
    with pytest.raises(RecipeError, match="example="):
        qcompile.quantize(nn.Linear(4, 4), "int8", progress=False)


def test_a_weight_in_a_module_that_does_more_is_left():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.plain = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.plain(torch.nn.functional.linear(torch.tanh(x), self.w)))

    model = Odd().eval().requires_grad_(False)
    report = qcompile.quantize(model, "int8", example=torch.randn(4, 8), progress=False)
    assert [s.quantized for s in report.sites] == [False, True]
    assert "no module computes just this product" in report.sites[0].reason


def test_a_broken_law_is_undone_and_named(monkeypatch):
    real = smoothquant.fold_scale

    def wrong(program, source, sites, scale):
        real(program, source, sites, scale)
        if source.norm is None:
            program.weights[sites[0].name] = program.weights[sites[0].name] * 1.5

    monkeypatch.setattr(smoothquant, "fold_scale", wrong)
    model, reference = build("llama"), build("llama")
    recipe = Recipe("broken", (Untie(), SmoothQuant(), Quantize(), Fuse()))
    with pytest.warns(UserWarning, match="SmoothQuant: BROKEN, undone; first at"):
        report = qcompile.quantize(model, recipe, [example("llama")], progress=False)
    assert not report.certificates[-1].holds
    with torch.no_grad():
        error = relative_error([model(**example("llama"))[0]], [reference(**example("llama"))[0]])
    assert error < 0.03


def test_report_is_data():
    _, report = quantized()
    data = json.loads(json.dumps(report.to_json()))
    assert len(data["sites"]) == 15 and data["bytes_after"] < data["bytes_before"]
    assert "15 of 15 sites" in str(report)


def test_deep_copies_are_free():
    model, _ = quantized()
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(**example("llama")).logits, model(**example("llama")).logits)


def test_calibration_batches_must_agree():
    with pytest.raises(CalibrationError, match="lacks"):
        qcompile.quantize(
            build("bert"),
            "int8-smooth",
            [{**example("bert"), "attention_mask": torch.ones(2, 8)}, example("bert")],
            progress=False,
        )
