"""In-place quantization and bad input: the model is as before or as requested, never between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile import NothingToQuantize, QuantLinear, RecipeError, Rule
from qcompile.ir.program import Program
from qcompile.recipe.certificate import relative_error


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
    words = {
        "none": "SmoothQuant .absmax.*Fix:.*qcompile.calibration_batches.tokenizer.",
        "empty": "empty",
        "nan": "batch 1 brings NaN",
    }[data]
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


def test_a_model_without_sites():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x)

    with pytest.raises(NothingToQuantize, match="no linear"):
        qcompile.quantize(Norms(), "int8", example=torch.randn(2, 8), progress=False)


def test_deep_copies_are_free():
    model, _ = quantized()
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(**example("llama")).logits, model(**example("llama")).logits)


def with_gains(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape) + 0.5  # as trained norms have
    return model


@pytest.mark.slow
@pytest.mark.parametrize("first,second", [("int8", "int8-smooth"), ("int8-rotated", "int8-rotated")])
def test_one_part_after_another(first, second):
    """What is quantized already has no weight to fold into: exact passes skip it, and the result stays right."""
    model, inputs = with_gains(build("llama")), example("llama")
    with torch.no_grad():
        want = model(**inputs).logits
    qcompile.quantize(
        model, qcompile.find_recipe(first).with_rules([Rule("*mlp*", keep=True)]), [inputs], progress=False
    )
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    qcompile.quantize(model, second, [inputs], progress=False)
    after = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(after) > len(linears) and all(m in after for m in linears)
    with torch.no_grad():
        assert relative_error([model(**inputs).logits], [want]) < 0.05


def test_a_failing_second_call_changes_nothing(monkeypatch):
    model, inputs = with_gains(build("llama")), example("llama")
    qcompile.quantize(model, qcompile.find_recipe("int8").with_rules([Rule("*mlp*", keep=True)]), progress=False)
    before, kinds = state(model), [type(m) for m in model.modules()]

    def fail(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(QuantLinear, "__init__", fail)  # the last that happens before anything is written
    with pytest.raises(KeyboardInterrupt):
        qcompile.quantize(model, "int8-smooth", [inputs], progress=False)
    assert unchanged(model, before) and [type(m) for m in model.modules()] == kinds
