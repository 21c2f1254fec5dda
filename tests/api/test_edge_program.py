"""A program for ExecuTorch is compared with the module before it stays; the runtime runs in `make test-executorch`."""

from __future__ import annotations

import pytest
import torch
from served_models import decoder, ids, quantized
from torch import nn

import qcompile
from qcompile.api import edge_program
from qcompile.api.edge_graph import EdgeCall
from qcompile.api.edge_program import write_edge_program
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.modules.quant_linear import QuantLinear
from qcompile.passes import Fuse, Quantize, QuantizeKV
from qcompile.recipe.recipe import Recipe

ACT = "int8/row/zero"


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    config = Quantize("int8/row", ACT, lm_head="int8/row", lm_head_act=ACT)
    qcompile.quantize(model, Recipe("edge", (config, Fuse())), example=torch.ones(4, 64), progress=False)
    return model


@pytest.fixture
def stand_in(monkeypatch):
    """ExecuTorch's two functions: the graph that was lowered runs by PyTorch; `change` is made to its outputs."""

    class State:
        change, graph, weights = staticmethod(lambda t: t), None, None

    def write_program(graph, path, facts):
        State.graph, State.facts = graph, facts
        path.write_bytes(b"program")
        return 3

    def run_program(path, calls):
        assert path.read_bytes() == b"program"
        module = State.graph.module()
        named = list(State.graph.call_spec.in_spec.children()[1].context)
        outs = [module(**dict(zip(named, call, strict=True))) if named else module(*call) for call in calls]
        return [[State.change(out)] for out in outs]

    monkeypatch.setattr(edge_program, "write_program", write_program)
    monkeypatch.setattr(edge_program, "run_program", run_program)
    return State


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_causal_lm_in_bfloat16_is_a_program_of_float32(tmp_path, stand_in):
    model = quantized("int4/group32/bf16", ACT, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    notes = write_edge_program(model, EdgeCall.of(model, None, 32), tmp_path / "m.pte")
    assert notes[1] == "7 weights read back by torchao, equal bit for bit"
    assert notes[2] == "the program computes in float32, and XNNPACK runs 3 parts of it"
    assert stand_in.facts["get_max_context_len"] == 32
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(module.act is not None for module in model.modules() if isinstance(module, QuantLinear))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("share, passes", [(0.0, True), (0.3, True), (30.0, False)])
def test_what_rounding_explains_is_allowed(tmp_path, stand_in, share, passes):
    """An error of a share of what rounding activations changes."""
    model, x = two_layers(), torch.randn(4, 64)
    call = EdgeCall.of(model, x, None)
    expected, acts = model(x), [m for m in model.modules() if isinstance(m, QuantLinear)]
    formats = [m.act for m in acts]
    for module in acts:
        module.act = None
    change = float((model(x) - expected).norm() / expected.norm())
    for module, form in zip(acts, formats, strict=True):
        module.act = form
    assert change > 1e-3, "or the smallest bar would decide"
    stand_in.change = lambda out: out + share * change * out
    if passes:
        notes = write_edge_program(model, call, tmp_path / "m.pte")
        assert f"where {2.5 * change:.1e} was allowed" in notes[3] and notes[0] == "inputs: float32 [4, 64]"
    else:
        with pytest.raises(ExportError, match="the program computes something else than the module: a relative error"):
            write_edge_program(model, call, tmp_path / "m.pte")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [lambda out: out * float("nan"), lambda out: out[:2]])
def test_an_output_of_another_kind_is_refused(tmp_path, stand_in, change):
    model = two_layers()
    stand_in.change = change
    with pytest.raises(ExportError, match="computes something else"):
        write_edge_program(model, EdgeCall.of(model, torch.ones(4, 64), None), tmp_path / "m.pte")


def test_a_site_without_a_kernel_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(edge_program, "take_intx_weights", lambda model: 1 / 0)
    model = quantized("int4/group32/bf16")
    with pytest.raises(ExportError, match="self_attn.q_proj: activations in float"):
        write_edge_program(model, EdgeCall.of(model, None, 32), tmp_path / "m.pte")
    assert not (tmp_path / "m.pte").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_cache_that_is_optional_is_not_in_the_program(tmp_path, stand_in):
    model = decoder()
    config = Quantize("int8/row", ACT, keep_lm_head=True)
    passes = (QuantizeKV(8, static=True, optional=True), config, Fuse())
    qcompile.quantize(model, Recipe("kv", passes), [ids()], progress=False)
    write_edge_program(model, EdgeCall.of(model, None, 32), tmp_path / "m.pte")
    scales = [node for node in stand_in.graph.graph.nodes if node.op == "placeholder" and "qcompile" in node.name]
    assert not any(node.users for node in scales)
