"""Architectures through the steps of zoo/steps.py: right, or refused for the reason that docs/architectures.md gives.

All steps on all architectures are `make architectures`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import ARCHITECTURES, ZOO, build, example
from zoo.outcome import FAULT, PASS, REFUSED, Fault, distance, same, tensors
from zoo.shortcuts import one_export, without_inductor
from zoo.steps import NOISE, STEPS, Case, applies, attempt, refusal_changes_nothing

from qcompile.recipe.rule import RecipeError

RESULTS = Path(__file__).parents[2] / "benches" / "results" / "architectures.json"
FAST = [
    "torch_audio", "torch_encoder_pre_norm", "torch_inverted_residual", "torch_lstm", "torch_mixer",
    "torch_multihead_attention", "torch_multihead_attention_bias_kv", "torch_residual_mlp", "torch_resnet",
    "torch_transformer", "torch_two_heads", "torch_unet",
]  # fmt: skip
# The same dataflow as another one that is tested; the core runs through every preset in test_presets.py.
SIMILAR = {
    "beit", "bert_mlm", "blenderbot", "clip_text", "cohere2", "convnextv2", "data2vec_audio", "deit", "electra",
    "exaone4", "falcon_mamba", "gemma", "glm4", "granite", "granitemoe", "helium", "hubert", "ibert", "imagegpt",
    "layoutlm", "longt5", "mbart", "mpnet", "mt5", "olmo", "olmo2", "pegasus", "plbart", "qwen3_moe", "roformer",
    "sew", "smollm3", "speech_to_text", "swinv2", "t5_encoder", "t5_gated", "umt5", "unispeech_sat", "videomae",
    "vit_mae", "yolos", "zamba", *ZOO,
}  # fmt: skip
COMPILED = ["torch_multihead_attention", "torch_unet", "torch_lstm", "torch_resnet"]


# What has no linear site, by the reason that the refusal gives; docs/architectures.md has all of them.
REFUSES = {"encodec": "cannot be traced to one graph", "poolformer": "a convolution, which no recipe quantizes"}


def check(name: str, *steps: str) -> None:
    """Passed, or refused for the known reason."""
    case = Case(name)
    with one_export(), without_inductor():
        found = {step: attempt(STEPS[step], case) for step in steps}
    assert not {step: o.text for step, o in found.items() if o.mark == FAULT}
    refused = {o.text for o in found.values() if o.mark == REFUSED}
    assert bool(refused) == (name in REFUSES), refused
    assert all(REFUSES[name] in text for text in refused), refused


@pytest.mark.parametrize("name", FAST)
def test_in_place(name):
    check(name, "float", "int8", "int8-rotated")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_and_saved(name):
    check(name, "compile", "save int8", "copy")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {*FAST, *SIMILAR}))
def test_every_architecture_in_place(name):
    check(name, "int8-rotated")


def test_the_table_is_of_this_zoo():
    known = json.loads(RESULTS.read_text())["architectures"]
    assert list(known) == [name for name in ARCHITECTURES if name in known]
    for name, steps in known.items():
        assert set(steps) <= {step for step in STEPS if applies(step, name)}, name
        assert all(o["text"] for o in steps.values() if o["mark"] != PASS), name


@pytest.mark.parametrize("name", ["xglm", "torch_two_heads", *list(ZOO)[-2:]])
def test_models_are_tiny_and_the_same_each_time(name):
    model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    with torch.no_grad():
        first, second = tensors(model(**example(name))), tensors(build(name)(**example(name)))
    assert first and same(first, second)


# -- the steps themselves see what is wrong -----------------------------------------------------------


def failing(case: Case, damage, error: Exception):
    """A step that changes a model, then raises inside of what checks refusals."""

    def step(_: Case) -> None:
        model = case.fresh()
        with refusal_changes_nothing(case, model):
            damage(model)
            raise error

    return step


def nothing(_: nn.Module) -> None:
    """No damage."""


def zero(model: nn.Module) -> None:
    """One bias is gone."""
    model[0].bias.zero_()


def break_(model: nn.Module) -> None:
    """The model raises."""
    model[0] = nn.Linear(3, 3)


@pytest.mark.parametrize(
    "damage,error,mark,text",
    [
        (nothing, RecipeError("because"), REFUSED, "RecipeError: because"),
        (nothing, KeyError("x"), FAULT, "KeyError"),
        (nothing, ValueError("of no class of ours"), FAULT, "of no class of ours"),
        (zero, RecipeError("because"), FAULT, "the model is changed after RecipeError"),
        (break_, RecipeError("because"), FAULT, "the model is broken"),
    ],
)
def test_a_refusal_is_ours_and_changes_nothing(damage, error, mark, text):
    case = Case("mlp")
    found = attempt(failing(case, damage, error), case)
    assert found.mark == mark and text in found.text


def test_a_wrong_result_is_a_fault(monkeypatch):
    case = Case("mlp")
    monkeypatch.setattr(case, "want", [tensor * 1.2 for tensor in case.want])
    assert attempt(STEPS["int8"], case).text.startswith("error 0.1")
    assert attempt(STEPS["float"], case).mark == FAULT
    monkeypatch.setattr(case, "want", case.outputs(case.model))
    assert attempt(STEPS["int8"], case).mark == PASS
    monkeypatch.setattr(case, "plain", {"int8": 1e-9})
    monkeypatch.setitem(NOISE, "int8", 0.0)
    assert "without rewriting" in attempt(STEPS["int8-rotated"], case).text


def test_distances():
    a, b = torch.ones(2, 3), torch.ones(2, 3) * 1.1
    assert abs(distance([b], [a]) - 0.1) < 1e-6
    with pytest.raises(Fault, match="shape"):
        distance([a.T], [a])
    assert not same([a], [b]) and not same([a], []) and same([a * torch.nan], [a * torch.nan])
    ids = torch.ones(2, dtype=torch.long)
    assert [t.shape[0] for t in tensors({"hidden": (torch.ones(5), ids), "logits": torch.ones(7)})] == [7, 5]


def test_one_export_gives_programs_of_their_own():
    case = Case("mlp")
    first = attempt(STEPS["int8"], case)
    with one_export():
        again = [attempt(STEPS["int8"], case) for _ in range(2)]
    assert {o.error for o in again} == {first.error} and first.mark == PASS
