"""Facts are found once for a graph, and anew for a rewritten one."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

from qcompile.analysis import facts as module
from qcompile.analysis.facts import Facts
from qcompile.ir.capture import capture
from qcompile.passes import OnlineHadamard, Untie
from qcompile.passes.equivalent.online_hadamard import online_hadamard
from qcompile.passes.equivalent.untie import untie
from qcompile.recipe.pass_context import PassContext

NAMES = ["sites", "norms", "norm_outputs", "streams", "attentions", "consumers"]


@pytest.fixture
def program():
    return capture(build("llama"), (), example("llama"))


@pytest.mark.parametrize("name", NAMES)
def test_a_fact_is_shared_until_the_graph_changes(program, name):
    facts = Facts(program)
    first = getattr(facts, name)
    assert first and getattr(facts, name) is first
    program.insert(torch.ops.aten.neg.default, (program.inputs[0],), after=program.inputs[0])
    assert getattr(facts, name) is not first
    assert getattr(facts, name) is getattr(facts, name)


def test_nothing_is_found_before_it_is_asked_for(program, monkeypatch):
    searched = []
    real = module.find_sites
    monkeypatch.setattr(module, "find_sites", lambda p: searched.append(p) or real(p))
    facts = Facts(program)
    assert not searched
    assert facts.sites and facts.consumers and facts.sites
    assert searched == [program]


def test_every_change_of_a_program_counts(program):
    changes = [
        lambda: program.add_weight("new", torch.zeros(3)),
        lambda: program.insert(torch.ops.aten.neg.default, (program.inputs[0],), after=program.inputs[0]),
        lambda: program.inline(torch.neg, (program.outputs[0],), before=program.output_node),
        lambda: program.replace(program.outputs[0], program.outputs[0]),
        program.cleanup,
    ]
    for change in changes:
        before = program.version
        change()
        assert program.version > before


def test_passes_see_the_graph_as_it_is(program):
    """After a rewriting the facts are those of a fresh search, node by node."""
    context = PassContext.of(program)
    names = [site.name for site in context.facts.sites]
    untie(program, Untie(), context)
    online_hadamard(program, OnlineHadamard(), context)
    program.cleanup()
    fresh = Facts(program)
    assert context.facts.sites == fresh.sites and context.facts.norms == fresh.norms
    assert [site.name for site in fresh.sites] != names
    nodes = set(program.graph.nodes)
    assert all(site.node in nodes and site.input in nodes for site in context.facts.sites)
    assert all(group.root in nodes for group in context.facts.consumers)


def test_a_copy_has_facts_of_its_own(program):
    facts, copy = Facts(program), program.copy()
    assert [s.name for s in facts.sites] == [s.name for s in Facts(copy).sites]
    assert not {s.node for s in facts.sites} & {s.node for s in Facts(copy).sites}
