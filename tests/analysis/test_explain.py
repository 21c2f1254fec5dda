"""What `qcompile explain` says of sites and streams."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from zoo import build, example

from qcompile.analysis.explain import explain, where
from qcompile.analysis.facts import Facts
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.scale_folding import scale_source
from qcompile.ir.capture import capture
from qcompile.passes import FoldNorm
from qcompile.passes.equivalent.fold_norm import fold_norm
from qcompile.recipe.pass_context import PassContext


def text(program):
    screen = io.StringIO()
    Console(file=screen, width=300).print(explain(program))
    return screen.getvalue()


def row(out, *words):
    (line,) = [line for line in out.splitlines() if all(word in line for word in words)]
    return line


def test_where_scales_fold():
    program = capture(build("llama"), (), example("llama"))
    facts = Facts(program)
    said = {g.sites[0].name: where(scale_source(program, g, facts.norms, facts.sites)) for g in facts.consumers}
    assert said["model.layers.0.self_attn.q_proj.weight"].startswith("gain of mul")
    assert (
        said["model.layers.0.self_attn.o_proj.weight"] == "rows of model.layers.0.self_attn.v_proj.weight, heads of 16"
    )
    assert said["model.layers.0.mlp.down_proj.weight"] == "rows of model.layers.0.mlp.up_proj.weight"
    assert where(Obstacle("sin", "it does not carry a scale")) == "no: it does not carry a scale at sin"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_site_has_a_row(name):
    program = capture(build(name), (), example(name))
    out = text(program)
    for site in Facts(program).sites:
        line = row(out, site.name, f" {site.N} x {site.K} ")
        assert site.kind in line and ("no: expert stack" in line) == (site.kind == "experts")
    assert f"Norms: {len(Facts(program).norms)}" in out


def test_states_of_a_stream():
    program = capture(build("mistral"), (), example("mistral"))
    assert "closed once FoldNorm has folded 5 gains" in row(text(program), " 64 ", "closed")
    fold_norm(program, FoldNorm(), PassContext.of(program))
    program.cleanup()
    line = row(text(program), " 64 ", "closed")
    assert "once" not in line and "open" not in line

    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            y = torch.sin(self.up(x))
            return self.down(self.norm(y))

    out = text(capture(Open(), (torch.randn(3, 8),)))
    assert "open: sin does not commute with a rotation at sin" in out and "closed" not in out


def test_tied_weights_are_listed():
    program = capture(build("llama"), (), example("llama"))
    ((name, others),) = program.aliases.items()
    assert f"Tied weights: {name} = {others[0]}" in text(program)
    assert "Tied weights: none" in text(capture(build("mlp"), (), example("mlp")))
