"""The registry: stages give the order of passes, and a violation is named."""

from __future__ import annotations

import itertools

import pytest

import qcompile.passes as passes
from qcompile.passes import (
    AWQ,
    DGQ,
    GPTQ,
    CalibratePrefix,
    FineQuant,
    FoldNorm,
    Fuse,
    IntactKV,
    LoRC,
    OnlineHadamard,
    PerTensorActivations,
    Quantize,
    QuantizeKV,
    ReorderChannels,
    Rotate,
    SmoothAttention,
    SmoothQuant,
    SpinQuant,
    Untie,
)
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.registry import Stage, kinds, registered
from qcompile.recipe.rule import RecipeError

ORDER = [
    (Stage.UNTIE, Untie()), (Stage.FOLD, FoldNorm()), (Stage.SMOOTH, SmoothQuant(norms=False)),
    (Stage.ROTATE, Rotate()), (Stage.ONLINE, OnlineHadamard()), (Stage.KV_PREFIX, IntactKV()),
    (Stage.KV_CACHE, QuantizeKV()), (Stage.ACTIVATIONS, PerTensorActivations()), (Stage.QUANTIZE, Quantize()),
    (Stage.CORRECT, LoRC()), (Stage.TRAIN, CalibratePrefix()), (Stage.FUSE, Fuse()),
]  # fmt: skip


def test_every_config_is_registered():
    exported = {value for value in vars(passes).values() if isinstance(value, type) and issubclass(value, PassConfig)}
    assert exported == set(registered())


def test_a_pass_of_every_stage():
    assert [stage for stage, _ in ORDER] == list(Stage)
    assert all(registered()[type(config)].stage is stage for stage, config in ORDER)


@pytest.mark.parametrize("first,second", list(itertools.pairwise(ORDER)))
def test_a_pass_before_one_of_an_earlier_stage_is_refused(first, second):
    (_, early), (_, late) = first, second
    with pytest.raises(RecipeError) as caught:
        Recipe("x", (late, early)).check()
    assert f"{type(late).__name__} must come after {type(early).__name__}: move it behind" in str(caught.value)


def test_every_violation_is_named_once():
    with pytest.raises(RecipeError) as caught:
        Recipe("x", (Fuse(), Quantize(), Untie())).check()
    assert str(caught.value).splitlines() == [
        "recipe 'x' cannot run:",
        "  Fuse must come after Quantize: move it behind",
        "  Fuse must come after Untie: move it behind",
        "  Quantize must come after Untie: move it behind",
    ]


@pytest.mark.parametrize(
    "one,other", [(SmoothQuant(norms=False), SmoothAttention()), (ReorderChannels(), OnlineHadamard())]
)
def test_passes_of_one_stage_may_stand_in_any_order(one, other):
    assert registered()[type(one)].stage is registered()[type(other)].stage
    for order in ((one, other), (other, one)):
        try:
            Recipe("x", order).check()
        except RecipeError as error:
            assert "must come after" not in str(error)


def test_kinds_count_as_what_they_are_a_kind_of():
    assert kinds(GPTQ()) == [GPTQ, Quantize] and kinds(DGQ()) == [DGQ, GPTQ, Quantize]
    with pytest.raises(RecipeError, match=r"Quantize stands twice \(places 1 and 2\): drop one"):
        Recipe("x", (Quantize(), FineQuant())).check()
    assert kinds(SpinQuant())[0] is SpinQuant


def test_what_a_pass_requires_may_be_another_kind_of_it():
    for quantize in (Quantize(), GPTQ()):
        Recipe("x", (quantize, LoRC())).check()
    with pytest.raises(RecipeError, match=r"LoRC needs Quantize before it: add Quantize\(\)"):
        Recipe("x", (LoRC(),)).check()


def test_needs_may_depend_on_the_config():
    needs = {type(config): registered()[type(config)].needs(config) for _, config in ORDER}
    assert needs[SmoothQuant] == ("absmax",) and needs[Untie] == () and needs[CalibratePrefix] == ("batches",)
    assert registered()[QuantizeKV].needs(QuantizeKV(8)) == ()
    assert registered()[QuantizeKV].needs(QuantizeKV(8, static=True)) == ("keys",)
    assert registered()[AWQ].needs(AWQ()) == ("batches",)


def test_exact_passes_are_those_before_codes_are_chosen():
    exact = {kind.__name__ for kind, entry in registered().items() if entry.exact}
    assert exact and all(e.stage <= Stage.ONLINE for e in registered().values() if e.exact and not e.trains)
    assert {kind.__name__ for kind, entry in registered().items() if entry.exact and entry.trains} == {"QALoRA"}
    assert {"Untie", "FoldNorm", "SmoothQuant", "Rotate", "OnlineHadamard"} <= exact
    assert registered()[LoRC].reads_float_weights and not registered()[Quantize].reads_float_weights
