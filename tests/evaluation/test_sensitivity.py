"""Sensitivity: the damage of single sites is what quantizing just that site does, and mixes are best."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from padded_batches import decoder, padded, texts
from zoo import build, example, is_dynamic

from qcompile.analysis.sites import find_sites
from qcompile.evaluation.sensitivity import Damage, SiteFormats, mix, mixed_recipe, plot, sensitivity, table
from qcompile.ir.capture import capture
from qcompile.numerics.divergence import kl_divergence, relative_squared_error
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe

CHOICES = [SiteFormats.parse("int4/group32/zero"), SiteFormats.parse("int8:int8/row")]


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "mlp"])
def test_one_site_at_a_time(name, tmp_path):
    inputs = example(name)
    program, flat = capture(build(name), (), inputs, dynamic=is_dynamic(name)), list(inputs.values())
    measure = kl_divergence if name in ("llama", "mixtral") else relative_squared_error
    found = sensitivity(program, [flat, flat], CHOICES, logits=measure is kl_divergence, progress=False)
    sites = [s.name for s in find_sites(program) if s.kind == "linear"]
    assert [d.site for d in found] == [s for s in sites for _ in CHOICES]
    for damage in (found[0], found[3], found[-1]):
        config = Quantize(damage.formats.weight, damage.formats.act, lm_head=None, clip=damage.formats.weight.bits < 8)
        others = {s.name: "another" for s in find_sites(program) if s.name != damage.site}
        one, _ = run(program, Recipe("one", (config, Fuse())), example=flat, keep_float=others)
        assert damage.kl == pytest.approx(float(measure(program(*flat)[0], one(*flat)[0])), rel=0.1, abs=3e-8)
    assert sum(d.kl for d in found[0::2]) > sum(d.kl for d in found[1::2])
    assert table(found).row_count == len(sites) + 1
    plot(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_padding_is_not_damaged():
    _, program = decoder()
    rows = texts([7, 7])
    batches = (padded(rows), padded(rows, extra=4), padded(rows, extra=4, left=True))
    want, *others = [sensitivity(program, iter([batch]), CHOICES, progress=False) for batch in batches]
    for found in others:
        assert [d.kl for d in found] == pytest.approx([d.kl for d in want], rel=1e-2, abs=1e-7)


def damages(draws):
    return [
        Damage(f"s{i}", kind, size, kl)
        for i, (size4, kl4, kl8) in enumerate(draws)
        for kind, size, kl in ((CHOICES[0], size4, kl4), (CHOICES[1], 2 * size4, kl8))
    ]


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 1), st.floats(0, 0.1)), min_size=1, max_size=5),
       st.floats(1, 2))  # fmt: skip
def test_a_mix_keeps_its_budget_and_is_close_to_the_best(draws, share):
    found = damages(draws)
    budget = int(share * sum(d[0] for d in draws))
    chosen = mix(found, nbytes=budget)
    by = {(d.site, d.formats): d for d in found}
    cost = sum(by[s, k].nbytes for s, k in chosen.items())
    loss = sum(by[s, k].kl for s, k in chosen.items())
    assert cost <= budget
    best = min(
        sum(by[f"s{i}", k].kl for i, k in enumerate(kinds))
        for kinds in itertools.product(CHOICES, repeat=len(draws))
        if sum(by[f"s{i}", k].nbytes for i, k in enumerate(kinds)) <= budget
    )
    assert loss <= best + max(d[1] - d[2] for d in draws) + 1e-9  # greedy misses at most one upgrade


def test_a_quality_goal():
    found = damages([(4, 0.5, 0.01), (4, 0.1, 0.01), (4, 0.2, 0.01)])
    assert mix(found, kl=0.4) == {"s0": CHOICES[1], "s1": CHOICES[0], "s2": CHOICES[0]}
    assert set(mix(found, kl=0.031).values()) == {CHOICES[1]}
    with pytest.raises(ValueError, match="still diverges by 0.03"):
        mix(found, kl=0.02)
    with pytest.raises(ValueError, match="the budget is"):
        mix(found, nbytes=11)
    with pytest.raises(ValueError, match="one goal"):
        mix(found)


def test_a_mixed_recipe_runs_and_reads_back():
    model, inputs = build("llama"), example("llama")
    program, flat = capture(model, (), inputs), list(inputs.values())
    found = sensitivity(program, [flat], CHOICES, progress=False)
    low, high = (sum(d.nbytes for d in found if d.formats == formats) for formats in CHOICES)
    recipe = mixed_recipe(find_recipe("w4a16"), mix(found, nbytes=(low + high) // 2))
    assert Recipe.from_json(recipe.to_json()) == recipe
    _, report = run(program, recipe, example=flat)
    assert {s.weight for s in report.sites} == {"int4/group32/zero", "int8/row"}
    assert low < report.bytes_after <= (low + high) // 2


def test_classes_are_of_perplexity():
    classes = [Damage("s", CHOICES[0], 1, kl).sensitivity for kl in (0.0, 0.004, 0.006, 0.024, 0.03)]
    assert classes == [1, 1, 2, 2, 3]


def test_nothing_to_measure_is_refused():
    program = capture(build("mlp"), (torch.randn(4, 48),))
    with pytest.raises(ValueError, match="at least one batch"):
        sensitivity(program, [], CHOICES)
    with pytest.raises(ValueError, match="unknown"):
        SiteFormats.parse("int4/group128:int9")
    assert str(SiteFormats(Format("int8"))) == "int8/row x float"
