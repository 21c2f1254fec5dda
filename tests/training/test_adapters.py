"""QA-LoRA in place: adding is the identity, merging is exact, and what cannot be adapted says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile import Format, QuantLinear, Recipe, RecipeError, Rule
from qcompile.modules.adapted_linear import AdaptedLinear
from qcompile.modules.adapted_stack import AdaptedStack
from qcompile.passes import Fuse, Quantize
from qcompile.training.adapters import adapted_names


def recipe(weight="int4/group32/zero", act=None):
    return Recipe("groups", (Quantize(Format.parse(weight), Format.parse(act) if act else None, lm_head=None), Fuse()))


def quantized(name="mlp", weight="int4/group32/zero", act=None):
    model = build(name)
    qcompile.quantize(model, recipe(weight, act), [example(name)], progress=False)
    return model, example(name)


def output_of(found):
    """The tensor of an output."""
    return found if isinstance(found, torch.Tensor) else found.logits if hasattr(found, "logits") else found[0]


def logits(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return output_of(found)


def trained(model, inputs, steps=4, lr=1e-2):
    """After some steps towards less of the outputs, so that every adapter has moved."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        output_of(model(**inputs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("weight,act", [
    ("int4/group48/floatzero", None), ("int8/group32", "int8/row"), ("int4/group32/zero", "int8/row"),
])  # fmt: skip
def test_adding_is_the_identity_and_settling_keeps_what_was_trained(weight, act):
    model, inputs = quantized(weight=weight, act=act)
    before = logits(model, inputs)
    report = qcompile.qa_lora(model, rank=4, alpha=8, example=inputs)
    assert torch.equal(logits(model, inputs), before), "B is zero"
    assert [certificate.error for certificate in report.certificates] == [0.0]
    tuned = logits(trained(model, inputs), inputs)
    assert (tuned - before).abs().max() > 0.05 * before.abs().max(), "or the merge proves nothing"
    qcompile.settle(model)
    assert torch.allclose(logits(model, inputs), tuned, rtol=0, atol=3e-6 * float(tuned.abs().max()) * 10)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    adapted = [model.get_submodule(path) for path in report.passes[0].done]
    assert all(isinstance(module, QuantLinear) and module.format.zero == "float" for module in adapted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_other_architectures(name):
    model, inputs = quantized(name)
    qcompile.qa_lora(model, rank=2, alpha=4)
    tuned = logits(trained(model, inputs), inputs)
    qcompile.settle(model)
    assert torch.allclose(logits(model, inputs), tuned, rtol=0, atol=3e-5 * float(tuned.abs().max()))


def test_a_rotated_site_pools_what_enters_the_product():
    model = build("llama")
    steps = qcompile.PRESETS["int8-rotated"].passes[:-2]
    qcompile.quantize(model, Recipe("r", (*steps, *recipe().passes)), [example("llama")], progress=False)
    assert any(isinstance(m, QuantLinear) and m.signs is not None for m in model.modules())
    qcompile.qa_lora(model, rank=4, alpha=8)
    tuned = logits(trained(model, example("llama")), example("llama"))
    qcompile.settle(model)
    assert torch.allclose(logits(model, example("llama")), tuned, rtol=0, atol=3e-5 * float(tuned.abs().max()))


def test_only_adapters_are_trained():
    model, inputs = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(True)
    report = qcompile.qa_lora(model, rank=4, alpha=8, example=inputs)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    done = report.passes[0].done
    assert trainable == {f"{path}.lora_{leaf}" for path in done for leaf in "ab"}
    trained(model, inputs)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_gives_the_output_and_what_has_no_groups_gets_none():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    x = torch.randn(4, 64)
    rules = [Rule("2.weight", weight=Format("int8"))]
    qcompile.quantize(model, recipe().with_rules(rules), example=x, progress=False)
    report = qcompile.qa_lora(model, rank=2, alpha=4, example=x)
    assert report.passes[0].done == ["0"]
    reasons = {item.site: item.reason for item in report.passes[0].skipped}
    assert "one scale for a row" in reasons["2"] and reasons["4"] == "it gives the output"


def test_rules_keep_products_as_they_are():
    model, inputs = quantized()
    with pytest.raises(RecipeError, match="matches no site"):
        qcompile.qa_lora(model, rank=2, rules=[Rule("*nothing*", keep=True)], example=inputs)
    report = qcompile.qa_lora(model, rank=2, rules=[Rule("0*", keep=True)], example=inputs)
    assert report.passes[0].done == ["2"] and type(model[0]) is QuantLinear


def test_a_module_that_is_called_twice_has_one_adapter():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(4, 64)
    qcompile.quantize(model, recipe(), example=x, progress=False)
    report = qcompile.qa_lora(model, rank=2, alpha=4, example=x)
    assert report.passes[0].done == ["0"] and model[0] is model[2] and isinstance(model[0], AdaptedLinear)


def test_the_same_seed_draws_the_same_adapters():
    drawn = []
    for seed in (0, 0, 1):
        model, inputs = quantized()
        qcompile.qa_lora(model, rank=2, seed=seed, example=inputs)
        drawn.append([m.lora_a.detach() for m in model.modules() if isinstance(m, AdaptedLinear)])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1][:, :2]), "each site has its own draw"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_have_adapters_too(name, tmp_path):
    model, inputs = quantized(name)
    untouched, before = copy.deepcopy(model), logits(model, inputs)
    report = qcompile.qa_lora(model, rank=4, alpha=8, example=inputs)
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedStack)}
    assert stacks and {path.removesuffix("_codes") for path in stacks} <= set(report.passes[0].done)
    assert torch.equal(logits(model, inputs), before), "B is zero"
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = logits(trained(model, inputs), inputs)
    for path in stacks:
        assert not torch.equal(model.state_dict()[f"{path}.lora_b"], start[f"{path}.lora_b"])
        codes = f"{path}.base_stack.codes"
        assert torch.equal(model.state_dict()[codes], start[codes])
    again = copy.deepcopy(untouched)
    qcompile.qa_lora(again, rank=4, alpha=8, example=inputs)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, inputs), tuned)
    qcompile.settle(model)
    assert torch.allclose(logits(model, inputs), tuned, rtol=0, atol=1e-4 * float(tuned.abs().max()))
    qcompile.save(model, tmp_path / "merged")
    loaded = qcompile.load(tmp_path / "merged", build(name))
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    linears = [name for name in report.passes[0].done if f"{name}_codes" not in stacks]
    assert adapted_names(untouched, 4, 8, inputs) == linears


def test_only_experts_and_rules_for_them():
    model, inputs = quantized("mixtral")
    names = adapted_names(model, 4, 8, inputs)
    rules = [Rule(f"*{name.rpartition('.')[2]}", keep=True) for name in names]
    report = qcompile.qa_lora(copy.deepcopy(model), rank=4, rules=rules, example=inputs)
    assert report.passes[0].done and all("experts" in name for name in report.passes[0].done)
    kept = qcompile.qa_lora(model, rank=4, rules=[Rule("*experts*", keep=True)], example=inputs)
    reasons = {item.site: item.reason for item in kept.passes[0].skipped if "experts" in item.site}
    assert reasons and all("kept as it is by the rule" in reason for reason in reasons.values())
    assert not any(isinstance(module, AdaptedStack) for module in model.modules())


@pytest.mark.parametrize("weight,why", [("int8/row", "one scale for a row"), ("int4/group32/zero/dual", "two-level")])
def test_a_model_without_movable_zero_points_is_refused_as_it_was(weight, why):
    model, inputs = quantized(weight=weight)
    state, before = model.state_dict().keys(), logits(model, inputs)
    with pytest.raises(RecipeError, match=f"{why}.*quantize\\(model, 'w4a16-g32'\\)"):
        qcompile.qa_lora(model, rank=2, example=inputs)
    assert model.state_dict().keys() == state and torch.equal(logits(model, inputs), before)


def test_bad_input_is_named():
    with pytest.raises(RecipeError, match="adapts no product.*has no quantized product"):
        qcompile.qa_lora(build("mlp"), example=example("mlp"))
    model, inputs = quantized()
    with pytest.raises(RecipeError, match="adapts no product: 0: rank 4000 is larger .*rank=48 or.*; 2: .*rank=64 or"):
        qcompile.qa_lora(model, rank=4000, example=inputs)
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(RecipeError, match="QALoRA: (rank|alpha) is"):
            qcompile.qa_lora(model, **wrong, example=inputs)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    qcompile.qa_lora(model, rank=2, example=inputs)
    with pytest.raises(RecipeError, match="in training already.*qcompile.settle"):
        qcompile.qa_lora(model, rank=2, example=inputs)


def test_training_state_cannot_be_saved_exported_or_quantized_as_if_it_were_settled(tmp_path):
    model, inputs = quantized()
    qcompile.qa_lora(model, rank=2, example=inputs)
    for refused in (
        lambda: qcompile.save(model, tmp_path / "out"),
        lambda: qcompile.export_onnx(model, tmp_path / "out", None),
        lambda: qcompile.quantize(model, "int8", example=inputs),
    ):
        with pytest.raises(ValueError, match=r"is in training \(AdaptedLinear\).*qcompile.settle\(model\) first"):
            refused()
    assert not (tmp_path / "out").exists()


def test_names_are_found_without_touching_the_model():
    model, inputs = quantized()
    expected = adapted_names(model, 2, 4, inputs)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert qcompile.qa_lora(copy.deepcopy(model), rank=2, example=inputs).passes[0].done == expected == ["0", "2"]


def test_state_of_training_is_resumed_bit_for_bit():
    first, inputs = quantized()
    qcompile.qa_lora(first, rank=2, alpha=4, example=inputs)
    trained(first, inputs, steps=2)
    second, _ = quantized()
    qcompile.qa_lora(second, rank=2, alpha=4, seed=9, example=inputs)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(logits(first, inputs), logits(second, inputs))


@pytest.mark.parametrize("backend", ["aot_eager", "qcompile"])
def test_compiled_training_is_eager_training(backend):
    model, inputs = quantized()
    qcompile.qa_lora(model, rank=2, alpha=4, example=inputs)
    copied = copy.deepcopy(model)
    trained(torch.compile(model, backend=backend), inputs, steps=3)
    trained(copied, inputs, steps=3)
    for (name, got), want in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert torch.allclose(got, want, atol=1e-5), name


def test_checkpointing_and_autocast_and_half_precision():
    model, inputs = quantized("llama")
    qcompile.qa_lora(model, rank=2, alpha=4)
    copied = copy.deepcopy(model)
    copied.activation_checkpointing_enable({"use_reentrant": False})
    copied.train()
    trained(model, inputs, steps=2)
    trained(copied, inputs, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        trained(model, inputs, steps=1)
    half = model.bfloat16()
    assert all(m.base_layer.scale.dtype == torch.float32 for m in half.modules() if isinstance(m, AdaptedLinear))
    trained(half, inputs, steps=1)
    qcompile.settle(half)
    assert torch.isfinite(logits(half, inputs)).all()
