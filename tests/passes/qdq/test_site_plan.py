"""Which sites are quantized and to what: the config's formats, rules, and the reasons to keep a site float."""

from __future__ import annotations

import pytest
import torch
from laws import shape
from torch import nn
from zoo import build, example

import qcompile
from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.passes import Quantize
from qcompile.passes.qdq.site_plan import chooses_experts, formats_of, planned_sites, writes_output
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError, Rule
from qcompile.testing import Decoder

INT4, INT8 = Format.parse("int4/group32"), Format("int8")


def decoder():
    model = Decoder(shape(layers=1))
    return capture(model, (model.example(),))


def test_the_logits_have_formats_of_their_own():
    config = Quantize(INT4, INT8, lm_head=INT8, lm_head_act=None)
    program, report = decoder(), PassReport("Quantize")
    planned = planned_sites(config, PassContext.of(program), report)
    assert [entry.site.name for entry in planned] == [site.name for site in find_sites(program)] and not report.skipped
    *blocks, logits = planned
    assert logits.site.name == "head.weight" and logits.is_lm_head
    assert (logits.weight, logits.act) == (INT8, None)
    assert {(entry.weight, entry.act, entry.is_lm_head) for entry in blocks} == {(INT4, INT8, False)}
    alike = planned_sites(Quantize(INT4, INT8, lm_head=None), PassContext.of(program), report)
    assert {(entry.weight, entry.act, entry.is_lm_head) for entry in alike} == {(INT4, INT8, False)}


def test_only_what_reaches_the_output_unmultiplied_writes_it():
    assert [site.name for site in find_sites(decoder()) if writes_output(site)] == ["head.weight"]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            return torch.tanh(y), self.second(y)

    sites = find_sites(capture(Two(), (torch.randn(3, 4),)))
    assert [writes_output(site) for site in sites] == [False, True]  # the first one is multiplied too


def test_a_product_that_a_quantized_one_reads_writes_no_output():
    """Of a model that was quantized in part, and is quantized again."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(3, 64)
    qcompile.quantize(model, find_recipe("int8").with_rules([Rule("0.*", keep=True)]), example=x, progress=False)
    (site,) = find_sites(capture(model, (x,)))
    assert site.name == "0.weight" and not writes_output(site)


@pytest.mark.parametrize(
    "rule, formats",
    [
        (None, (INT8, None)),
        (Rule("head.weight", weight=INT4), (INT4, None)),
        (Rule("head.weight", act=INT8), (INT8, INT8)),
        (Rule("head.weight", weight=INT4, act=INT8), (INT4, INT8)),
    ],
)
def test_a_rule_replaces_what_it_names(rule, formats):
    *_, inner, logits = find_sites(decoder())
    assert formats_of(logits, Quantize(INT4, INT8), rule) == formats
    weight, act = (rule and rule.weight) or INT8, (rule and rule.act) or Format("fp8")
    assert formats_of(inner, Quantize(INT8, "fp8"), rule) == (weight, act)


def test_columns_that_are_no_blocks_get_a_format_of_their_own_or_are_refused():
    k6, q4_1 = Format.parse("int4/group32/k6"), Format.parse("int4/group32/floatzero/f16")
    wide = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    program = capture(wide, (torch.randn(3, 64),))

    def formats(config, rules=None):
        planned = planned_sites(config, PassContext.of(program, rules=rules or {}), PassReport("Quantize"))
        return [entry.weight for entry in planned]

    assert formats(Quantize(k6, None, lm_head=INT8, undivided=q4_1)) == [q4_1, k6, INT8]
    assert formats(Quantize(k6, None, lm_head=None, undivided=q4_1)) == [q4_1, k6, q4_1]
    rules = {"0.weight": Rule("0.*", weight=INT4), "2.weight": Rule("2.*", weight=INT8)}
    assert formats(Quantize(k6, None, lm_head=None, undivided=q4_1), rules) == [INT4, INT8, q4_1]
    with pytest.raises(RecipeError, match="^0.weight: 64 columns are no whole blocks of 256, which int4/group32/k6"):
        formats(Quantize(k6, None))
    with pytest.raises(RecipeError, match="4.weight: 64 columns"):
        formats(Quantize(INT4, None), {"4.weight": Rule("4.*", weight=k6)})
    with pytest.raises(RecipeError, match="is in blocks of 256 too"):
        Quantize(k6, None, undivided=k6)
    wide[2].weight.data[0, 0] = 1e9
    with pytest.raises(RecipeError, match="^2.weight: a scale of .* is beyond float16"):
        formats(Quantize(k6, None, undivided=INT4))
    wide[2].weight.data[0, 0] = 1e6  # a scale of one level would be beyond float16
    assert formats(Quantize(k6, None, lm_head=None, undivided=INT4)) == [INT4, k6, INT4]


def test_sites_that_stay_float_say_why():
    program, report = decoder(), PassReport("Quantize")
    rules = {"blocks.0.up.weight": Rule("*.up.*", keep=True), "head.weight": Rule("head*", weight=INT4)}
    context = PassContext.of(program, rules=rules, keep_float={"blocks.0.gate.weight": "no kernel is faster"})
    planned = planned_sites(Quantize(), context, report)
    assert {place.site: place.reason for place in report.skipped} == {
        "blocks.0.up.weight": "kept float by the rule '*.up.*'",
        "blocks.0.gate.weight": "no kernel is faster",
    }
    assert len(planned) == len(find_sites(program)) - 2
    assert not planned[-1].is_lm_head, "its format is the rule's, not the recipe's"


def test_what_chooses_experts_is_skipped_unless_a_rule_says_otherwise():
    program = capture(build("mixtral"), (), example("mixtral"))
    routers = {site.name for site in find_sites(program) if chooses_experts(site)}
    assert len(routers) == 2 and all(name.endswith("gate.weight") for name in routers)
    report = PassReport("Quantize")
    planned = planned_sites(Quantize(), PassContext.of(program), report)
    assert {place.site for place in report.skipped} == routers
    experts = [entry for entry in planned if entry.site.kind == "experts"]
    assert len(experts) == 4 and all(entry.act is None for entry in experts), "stacks are weight-only"
    for rule, acts in ((None, (None, INT8)), (Rule("*", act="fp8"), (None, Format("fp8")))):
        found = [formats_of(experts[0].site, Quantize(INT4, experts_act=act), rule)[1] for act in (None, INT8)]
        assert found == list(acts), "experts read codes where the recipe says so, and only there"
    rules = {name: Rule(name, weight=INT8) for name in routers}
    planned = planned_sites(Quantize(), PassContext.of(program, rules=rules), PassReport("Quantize"))
    assert routers <= {entry.site.name for entry in planned}


class Choice(nn.Module):
    """Scores, and what a function makes of them beside a sum."""

    def __init__(self, function):
        super().__init__()
        self.scores, self.function = nn.Linear(8, 4), function

    def forward(self, x):
        return x.sum(-1), self.function(self.scores(x).softmax(-1))


CHOICES = {
    "the index of a maximum": (lambda y: nn.functional.one_hot(y.argmax(-1), 4), True),
    "a maximum with its index": (lambda y: y * nn.functional.one_hot(y.max(-1).indices, 4), True),
    "a threshold under a maximum": (lambda y: y.max(-1).values, False),
    "a scale by a maximum": (lambda y: y / y.max(-1, keepdim=True).values, False),
    "a prediction": (lambda y: y.argmax(-1).to(torch.int32).view(-1), False),
    "a maximum over the last dimension by its number": (lambda y: nn.functional.one_hot(y.argmax(2), 4), True),
    "the largest channels": (lambda y: nn.functional.one_hot(y.topk(2).indices, 4), True),
    "the largest of all values": (lambda y: nn.functional.one_hot(y.argmax(), 60), False),
    "the largest tokens": (lambda y: nn.functional.one_hot(y.sum(-1).topk(2).indices, 5), False),
    "the largest channels behind a product": (
        lambda y: nn.functional.linear(y, torch.eye(4)).topk(2).indices * 2,
        False,
    ),
    "a maximum over tokens": (lambda y: nn.functional.one_hot(y.argmax(1), 5), False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_by_a_maximum(name):
    function, expected = CHOICES[name]
    (site,) = find_sites(capture(Choice(function).requires_grad_(False), (torch.randn(3, 5, 8),), dynamic=False))
    assert chooses_experts(site) is expected


class Twice(nn.Module):
    """One weight that is read at two places: it gives the output, or chooses, at the second one only."""

    def __init__(self, chooses):
        super().__init__()
        self.layer, self.chooses = nn.Linear(8, 8, bias=False), chooses

    def forward(self, x):
        y = self.layer(torch.tanh(self.layer(x)))
        return x * nn.functional.one_hot(y.topk(1).indices[..., 0], 8) if self.chooses else y


def test_a_weight_has_one_format_wherever_it_is_read():
    programs = [capture(Twice(chooses).requires_grad_(False), (torch.randn(3, 8),)) for chooses in (False, True)]
    config, report = Quantize(INT4, INT8, lm_head=INT8), PassReport("Quantize")
    planned = planned_sites(config, PassContext.of(programs[0]), report)
    assert [(p.weight, p.act, p.is_lm_head) for p in planned] == [(INT8, None, True)] * 2 and not report.skipped
    assert not planned_sites(config, PassContext.of(programs[1]), report)
    assert [place.site for place in report.skipped] == ["layer.weight"] * 2


class Stacks(nn.Module):
    """A product with a stack of three weights."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x):
        return torch.matmul(x, self.stack)


def test_a_stack_that_is_multiplied_in_a_batch_is_quantized():
    program, report = capture(Stacks().requires_grad_(False), (torch.randn(3, 5, 8),), dynamic=False), PassReport("Q")
    (planned,) = planned_sites(Quantize(), PassContext.of(program), report)
    assert planned.site.name == "stack" and planned.site.batched and not report.skipped


def test_stacks_of_other_products_stay_float():
    program, report = capture(Stacks().requires_grad_(False), (torch.randn(2, 3, 5, 8),)), PassReport("Quantize")
    assert [site.kind for site in find_sites(program)] == ["experts"]
    assert not planned_sites(Quantize(), PassContext.of(program), report)
    assert report.skipped[0].reason.startswith("neither rows sorted by expert")


def test_formats_that_no_site_can_have_are_refused():
    for act in ({name: "int4/group32/dual"} for name in ("act", "lm_head_act", "experts_act")):
        with pytest.raises(RecipeError, match="activations have no second level of scales"):
            Quantize(**act)
    with pytest.raises(RecipeError, match="runtime smoothing is for activations"):
        Quantize("int4/group32/smooth")


def test_a_scale_beyond_float16_is_refused_with_its_site_before_any_work():
    model = Decoder(shape(layers=1))
    name = find_sites(capture(model, (model.example(),)))[2].name
    with torch.no_grad():
        model.get_parameter(name)[1, 5] = 3e6
    form = Format.parse("int4/group32/f16")
    with pytest.raises(RecipeError, match=rf"{name}: the scale 4.29e\+05 of format int4/group32/f16 is beyond float16"):
        planned_sites(Quantize(form, None), PassContext.of(capture(model, (model.example(),))), PassReport("Quantize"))
    assert planned_sites(
        Quantize(Format.parse("int4/group32/bf16"), None),
        PassContext.of(capture(model, (model.example(),))),
        PassReport("Quantize"),
    )


def test_activations_have_no_stored_scales():
    with pytest.raises(RecipeError, match="scales of activations are not stored.*Fix: drop bf16"):
        Quantize(INT4, Format.parse("int8/row/bf16"))
    with pytest.raises(RecipeError, match="rule '.*' gives activations int8/row/f16.*Fix: drop f16"):
        Rule("*", act="int8/row/f16")


def test_the_logits_may_stay_float():
    program, report = decoder(), PassReport("Quantize")
    config = Quantize(INT4, None, keep_lm_head=True)
    planned = planned_sites(config, PassContext.of(program), report)
    assert "head.weight" not in [entry.site.name for entry in planned] and len(planned) == len(find_sites(program)) - 1
    assert [(s.site, s.reason) for s in report.skipped] == [
        ("head.weight", "it gives the logits, which stay float (keep_lm_head)")
    ]
    rule = Rule("head.*", weight=INT8)
    context = PassContext.of(program, rules={"head.weight": rule})
    assert planned_sites(config, context, report)[-1].weight == INT8
