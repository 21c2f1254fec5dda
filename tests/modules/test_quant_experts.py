"""Stacks of expert weights: quantized expert by expert, in graphs, modules, checkpoints and compiled models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from zoo import build, example

import qcompile
from qcompile.analysis.sites import find_sites
from qcompile.calibration.hessian import Gram
from qcompile.ir.capture import capture
from qcompile.modules.quant_experts import QuantStack, replace_parameter
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import GPTQ, HQQ, FineQuant, Fuse, Quantize, Untie
from qcompile.passes.qdq.insert_qdq import matrix_of
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

INT4 = Format.parse("int4/group32/zero")
MODELS = ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)]


def experts(model):
    return {n: p for n, p in model.named_parameters() if p.ndim == 3}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_rounds_each_expert_by_itself(name):
    model, inputs = build(name), example(name)
    program = capture(model, (), inputs)
    sites = [s for s in find_sites(program) if s.kind == "experts"]
    assert len(sites) == 4 and all(s.grouped and s.rows_first for s in sites)
    recipe = Recipe("q", (Quantize(INT4, None, lm_head=INT4), Fuse()))
    quantized, report = run(program, recipe, example=list(inputs.values()))
    assert not [s for s in report.sites if not s.quantized and "chooses experts" not in s.reason], report
    for full, tensor in experts(model).items():
        rounded = [quantize_tensor(matrix, INT4).dequantize() for matrix in tensor]
        model.get_submodule(full.rpartition(".")[0]).register_parameter(
            full.rpartition(".")[2], torch.nn.Parameter(torch.stack(rounded), requires_grad=False)
        )
    rest = Recipe("rest", recipe.passes, tuple(Rule(n, keep=True) for n in experts(model)))
    want, _ = run(capture(model, (), inputs), rest, example=list(inputs.values()))
    assert relative_error(quantized(*inputs.values())[:1], want(*inputs.values())[:1]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "config", [Quantize(INT4, None), GPTQ(INT4, None), HQQ(), FineQuant(group_sizes=(64, 32), bits=5.2)]
)
def test_modules_checkpoints_and_compiled_models(name, config, tmp_path):
    model, inputs = build(name), example(name)
    float_model, before = copy.deepcopy(model), sum(p.numel() * 4 for p in experts(model).values())
    report = qcompile.quantize(model, Recipe("q", (config, Fuse())), [inputs], progress=False)
    assert not experts(model) and sum(isinstance(m, QuantStack) for m in model.modules()) == 4
    stored = sum(t.nbytes for m in model.modules() if isinstance(m, QuantStack) for t in m.buffers())
    assert stored < 0.3 * before
    sites = [s for s in report.sites if "experts" in s.name]
    assert len(sites) == 4 and sum(s.bytes_after for s in sites) == stored and all(s.act == "float" for s in sites)
    with torch.no_grad():
        want, got = float_model(**inputs).logits, model(**inputs).logits
        assert relative_error([got], [want]) < 0.2
        qcompile.save(model, tmp_path / "m")
        assert torch.equal(qcompile.load(tmp_path / "m")(**inputs).logits, got)
        again = capture(model, (), inputs)
        fused = again.copy()
        assert relative_error(fused(*inputs.values())[:1], [got]) < 1e-5


@pytest.mark.slow
def test_it_compiles():
    model, inputs = build("mixtral"), example("mixtral")
    qcompile.quantize(model, Recipe("q", (Quantize(INT4, None), Fuse())), progress=False)
    with torch.no_grad():
        want = model(**inputs).logits
        got = torch.compile(model, backend="qcompile", options={"recipe": "float"})(**inputs).logits
    assert relative_error([got], [want]) < 1e-4


@pytest.mark.slow
def test_the_backend_keeps_experts_float_unless_requested():
    model, inputs = build("mixtral"), example("mixtral")
    with torch.no_grad():
        want = model(**inputs).logits
        for on_slow_kernel in ("keep_float", "quantize"):
            torch._dynamo.reset()
            fast = torch.compile(
                model, backend="qcompile", options={"recipe": "int8", "on_slow_kernel": on_slow_kernel}
            )
            assert relative_error([fast(**inputs).logits], [want]) < 0.05


def test_an_expert_that_nobody_reached_is_rounded_to_nearest():
    model, inputs = build("mixtral"), {"input_ids": torch.full((2, 8), 5)}  # one token chooses the same two experts
    program = capture(model, (), inputs)
    site = next(s for s in find_sites(program) if s.kind == "experts")
    ends = []
    program.watch([site.node.args[2]], list(inputs.values()), lambda node, value: ends.append(value.tolist()))
    dead = [e for e in range(4) if ends[0][e] == ([0] + ends[0])[e]]
    alive = [e for e in range(4) if e not in dead]
    assert dead and alive
    quantized, report = run(program, Recipe("q", (GPTQ(INT4, None), Fuse())), batches=lambda: [list(inputs.values())])
    codes = quantized.weights[f"{site.name}.codes"]
    for expert, matrix in enumerate(matrix_of(program, site).split(site.N)):
        nearest = torch.equal(codes[expert], quantize_tensor(matrix, INT4).stored())
        assert nearest == (expert in dead), (expert, dead)
    assert not any("singular" in note for p in report.passes for note in p.notes)


class Batched(torch.nn.Module):
    """Every expert works on every row: products [E, T, K] by stacks, stored one way and the other."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(64, 64)
        self.up = torch.nn.Parameter(torch.randn(4, 64, 96) / 8)
        self.down = torch.nn.Parameter(torch.randn(4, 64, 96) / 8)

    def forward(self, x):
        every = self.mix(x).flatten(0, 1).expand(4, -1, -1)
        inner = torch.nn.functional.silu(torch.bmm(every, self.up))
        return torch.matmul(inner, self.down.transpose(1, 2)).sum(0)


def test_a_cast_model_keeps_its_scales():
    model = build("mixtral")
    qcompile.quantize(model, Recipe("q", (Quantize(INT4, None), Fuse())), progress=False)
    stacks = [m for m in model.modules() if isinstance(m, QuantStack)]
    want = [stack() for stack in stacks]
    model.bfloat16()
    assert all(s.scale.dtype == torch.float32 and s().dtype == torch.bfloat16 for s in stacks)
    assert model(**example("mixtral")).logits.dtype == torch.bfloat16
    model.float()
    assert all(torch.equal(s(), w) for s, w in zip(stacks, want, strict=True))


@pytest.mark.parametrize(
    "config", [Quantize(INT4, None, lm_head=None), GPTQ(INT4, None, lm_head=None), HQQ(lm_head=None)]
)
def test_batched_products(config, tmp_path):
    torch.manual_seed(0)
    model, x = Batched().requires_grad_(False).eval(), torch.randn(2, 40, 64)
    program = capture(model, (x,), {})
    stacks = [s for s in find_sites(program) if s.kind == "experts"]
    assert [(s.name, s.N, s.K, s.batched, s.rows_first) for s in stacks] == [
        ("up", 96, 64, True, False),
        ("down", 64, 96, True, True),
    ]
    want, before = model(x), model.up.nbytes + model.down.nbytes
    rounded = copy.deepcopy(model)
    qcompile.quantize(model, Recipe("q", (config, Fuse())), [x], progress=False)
    assert sum(t.nbytes for m in model.modules() if isinstance(m, QuantStack) for t in m.buffers()) < 0.3 * before
    assert relative_error([model(x)], [want]) < 0.15
    if type(config) is Quantize:
        for name, transposed in (("up", True), ("down", False)):
            matrices = [m.t() if transposed else m for m in getattr(rounded, name)]
            near = torch.stack([quantize_tensor(m, INT4).dequantize() for m in matrices])
            assert torch.allclose(getattr(model, name), near.transpose(1, 2) if transposed else near, atol=1e-6)
    fused, _ = run(program, Recipe("q", (config, Fuse())), batches=lambda: [[x]], example=[x])
    assert sum(n.target is torch.ops.qcompile.qexperts.default for n in fused.graph.nodes) == 2
    for rows in (3, 40):  # traced with 40: the number of rows is free
        y = torch.randn(2, rows, 64)
        assert relative_error(fused(y)[:1], [model(y)]) < 1e-5
    qcompile.save(model, tmp_path / "m")
    assert torch.equal(qcompile.load(tmp_path / "m", Batched())(x), model(x))
    compiled = torch.compile(copy.deepcopy(model), backend="qcompile", options={"recipe": "float"})
    assert relative_error([compiled(x)], [model(x)]) < 1e-4


def test_rows_of_an_expert_begin_where_the_last_ones_end(monkeypatch):
    """The Hessians of a stack are those of each expert's own rows: together they are all rows', once."""
    counts = []
    monkeypatch.setattr(Gram, "add", lambda self, x, real=Gram.add: (counts.append(len(x)), real(self, x))[1])
    model = build("mixtral")
    passes = (Untie(), GPTQ(INT4, None, lm_head=None), Fuse())
    qcompile.quantize(model, Recipe("q", passes), [example("mixtral")], progress=False)
    tokens = example("mixtral")["input_ids"].numel()
    stacks = [counts[i : i + 4] for i in range(len(counts) - 3) if sum(counts[i : i + 4]) == 2 * tokens]
    assert len(stacks) >= 4, counts  # two stacks of four experts in each of two layers; a token meets two experts


def test_gptq_sees_the_rows_of_each_expert():
    """Expert e of `down` reads rows that only it computes: with their Hessian its error is less than nearest's."""
    torch.manual_seed(0)
    model, x = Batched().requires_grad_(False).eval(), torch.randn(4, 40, 64) @ torch.randn(64, 64) / 8
    program, errors = capture(model, (x,), {}), {}
    for config in (Quantize(INT4, None, lm_head=None), GPTQ(INT4, None, lm_head=None)):
        only = Recipe("q", (config, Fuse()), (Rule("up", keep=True), Rule("mix*", keep=True)))
        quantized, _ = run(program, only, batches=lambda: [[x]], example=[x])
        assert any(n.target is torch.ops.qcompile.qexperts.default for n in quantized.graph.nodes)
        errors[type(config)] = (quantized(x)[0] - program(x)[0]).norm()
    assert errors[GPTQ] < 0.8 * errors[Quantize], errors


class Owner(torch.nn.Module):
    """A module that multiplies its two stacks itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (torch.nn.Parameter(torch.randn(2, 6, 32)) for _ in range(2))


def with_stacks():
    model = torch.nn.ModuleList([Owner(), Owner()])
    for index in range(2):
        for leaf in ("up", "down"):
            matrix = getattr(model[index], leaf).detach().flatten(0, 1)
            parts = [None if t is None else t.unflatten(0, (2, 6)) for t in quantize_tensor(matrix, INT4).stored_parts]
            stack = QuantStack(dict(zip(PARTS, parts, strict=True)), INT4, 32, True, torch.float32)
            replace_parameter(model, f"{index}.{leaf}", stack)
    return model


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_owners_of_stacks_are_copied_and_pickled(again):
    model = with_stacks()
    assert type(model[0]) is type(model[1]) and isinstance(model[0], Owner)
    copied = again(again(model))
    for index in range(2):
        assert type(copied[index]) is type(model[index])
        for leaf in ("up", "down"):
            assert torch.equal(getattr(copied[index], leaf), getattr(model[index], leaf))
    copied[0].up_codes.scale.zero_()
    assert not torch.equal(copied[0].up, model[0].up)
