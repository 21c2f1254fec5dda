"""torch.compile(model, backend="qcompile") on small models, as a user calls it."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.backend import dynamo
from qcompile.memory import weight_cache
from qcompile.recipe.certificate import relative_error


def mlp():
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
        .eval()
        .requires_grad_(False)
    )


def compiled(model, **options):
    options.setdefault("on_slow_kernel", "quantize")
    return torch.compile(model, backend="qcompile", options=options)


def cases():
    """Every recipe, dtype and number of rows; two of them fast."""
    for recipe in ("int8", "w8a16", "w4a16", "w4a8", "fp8", "w4a4-rotated"):
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 3, 40):
                fast = recipe in ("int8", "w4a16") and dtype == torch.float32 and rows == 3
                yield pytest.param(recipe, dtype, rows, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize("recipe,dtype,rows", list(cases()))
def test_compiled_is_the_eager_reference(recipe, dtype, rows):
    model = mlp().to(dtype)
    x = torch.randn(rows, 128, dtype=dtype)
    reference = copy.deepcopy(model)
    qcompile.quantize(reference, recipe, example=x, progress=False, verify=False)
    with torch.no_grad():
        error = relative_error([compiled(model, recipe=recipe)(x)], [reference(x)])
    # Eager rounds to bfloat16 between operations, Inductor does not: coarse codes may fall to the other side.
    coarse = 8e-2 if recipe in ("fp8", "w4a4-rotated") else 2e-2
    assert error < (1e-5 if dtype == torch.float32 else coarse)


@pytest.mark.slow
def test_quantized_module_compiles_to_the_same():
    model = build("llama")
    qcompile.quantize(model, "w4a8", progress=False)
    with torch.no_grad():
        want = model(**example("llama")).logits
        assert relative_error([torch.compile(model, backend="qcompile")(**example("llama")).logits], [want]) < 1e-5
    assert dynamo.reports[-1].recipe == "already quantized"


@pytest.mark.slow
def test_generate_through_compile():
    model = build("llama")
    reference = copy.deepcopy(model)
    qcompile.quantize(reference, "int8", progress=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    arguments = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    model.compile(backend="qcompile", options={"on_slow_kernel": "quantize"})
    assert model.generate(ids, **arguments).tolist() == reference.generate(ids, **arguments).tolist()


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2")),
     pytest.param("gemma2", marks=pytest.mark.exhaustive)],
)  # fmt: skip
def test_generate_needs_a_graph_for_prompts_and_one_for_tokens(name):
    """Inductor alone compiles a third, for a cache to which its first graph gives other strides than its second."""
    model, ids = build(name), torch.tensor([[5, 6, 7, 8]])
    arguments = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    want = model.generate(ids, **arguments).tolist()
    torch._dynamo.reset()
    dynamo.reports.clear()
    model.compile(backend="qcompile", dynamic=True, options={"recipe": "exact"})
    assert model.generate(ids, **arguments).tolist() == want
    assert len(dynamo.reports) == 2


@pytest.mark.slow
def test_dynamic_rows_compile_once():
    model = mlp()
    run = torch.compile(
        model,
        backend="qcompile",
        dynamic=True,
        fullgraph=True,
        options={"recipe": "w4a8", "on_slow_kernel": "quantize"},
    )
    reference = copy.deepcopy(model)
    qcompile.quantize(reference, "w4a8", example=torch.randn(2, 128), progress=False)
    dynamo.reports.clear()
    with torch.no_grad():
        for rows in (5, 9, 33):
            x = torch.randn(rows, 128)
            assert relative_error([run(x)], [reference(x)]) < 1e-5
    assert len(dynamo.reports) == 1 and "dynamic" in str(dynamo.reports[0])


@pytest.mark.slow
def test_a_changed_parameter_is_noticed():
    model = mlp()
    run = compiled(model)
    x = torch.randn(4, 128)
    with torch.no_grad():
        first = run(x)
        model[0].weight.mul_(2)
        second = run(x)
        want = model(x)
    assert relative_error([second], [want]) < 0.03 < relative_error([first], [want])


@pytest.mark.slow
def test_graphs_share_their_weights():
    model = mlp()
    run = compiled(model, recipe="w4a8")
    with torch.no_grad():
        run(torch.randn(4, 128))
        before = weight_cache.entry_count()
        run(torch.randn(1, 128))
        grown = weight_cache.entry_count()
        torch._dynamo.reset()
    assert grown == before


@pytest.mark.slow
def test_equal_codes_with_other_scales_are_not_shared():
    first, second = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
    second.weight.data = 4 * first.weight.data
    model = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(128, 8)).requires_grad_(False)
    x, run = torch.randn(4, 128), compiled(model, recipe="w4a16")
    got = run(x)
    qcompile.quantize(model, "w4a16", example=x, progress=False)
    assert relative_error([got], [model(x)]) < 1e-4


def test_gradients_get_float_and_one_warning(monkeypatch):
    monkeypatch.setattr(dynamo, "_warned", [])
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    run = compiled(model)
    x = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="gradients are enabled.*no_grad"):
        run(x).sum().backward()
    assert model[0].weight.grad is not None
    assert torch.allclose(run(x), model(x))
    with torch.no_grad():
        assert not torch.equal(run(x), model(x))


def test_graph_breaks_are_compiled_piece_by_piece():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model = Broken().eval().requires_grad_(False)
    dynamo.reports.clear()
    with torch.no_grad():
        x = torch.randn(4, 64)
        assert relative_error([compiled(model)(x)], [model(x)]) < 0.03
    assert [s.name for r in dynamo.reports for s in r.sites] == ["a.weight", "b.weight"]
    assert any("graph break" in str(r) and "test_dynamo.py" in str(r) for r in dynamo.reports)
    torch._dynamo.reset()
    dynamo.reports.clear()
    with torch.no_grad():  # a rule for one piece is no mistake in the other
        compiled(model, rules=[{"match": "b.*", "keep": True}])(x)
    assert [s.quantized for r in dynamo.reports for s in r.sites] == [True, False]


def test_pieces_without_a_tensor_run_as_they_are():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x):
            size = x.shape[0]
            torch._dynamo.graph_break()
            steps = torch.arange(size) * 2 + torch.ones(4)
            torch._dynamo.graph_break()
            return self.a(x) + steps[:, None]

    model, x = Pieces().eval().requires_grad_(False), torch.randn(4, 64)
    dynamo.reports.clear()
    with torch.no_grad():
        assert relative_error([compiled(model)(x)], [model(x)]) < 0.03
    assert [s.name for r in dynamo.reports for s in r.sites] == ["a.weight"]


def test_slower_sites_stay_float_and_say_so():
    model = mlp().to(torch.bfloat16)
    with torch.no_grad():
        x = torch.randn(64, 128, dtype=torch.bfloat16)
        torch.compile(model, backend="qcompile", options={"recipe": "fp8"})(x)
    *sites, head = dynamo.reports[-1].sites  # the last layer counts as a head, whose int8 has a kernel
    assert sites and all(not s.quantized and "slower than float" in s.reason for s in sites) and head.quantized


@pytest.mark.slow
def test_every_graph_is_judged_at_the_rows_of_the_option():
    """fp8 has no kernel on a CPU; int4 is slower than float in prefill in bfloat16, and faster in decoding."""
    model = mlp().to(torch.bfloat16)
    kept = []
    with torch.no_grad():
        x = torch.randn(512, 128, dtype=torch.bfloat16)
        for options in ({}, {"rows": 1}):
            torch._dynamo.reset()
            torch.compile(model, backend="qcompile", options={"recipe": "w4a16", **options})(x)
            kept.append(sum(not s.quantized for s in dynamo.reports[-1].sites))
    assert kept[0] > kept[1]


@pytest.mark.slow
def test_found_without_importing_qcompile():
    code = (
        "import torch, sys\n"
        "m = torch.nn.Linear(64, 64).requires_grad_(False)\n"
        "assert 'qcompile' not in sys.modules\n"
        "f = torch.compile(m, backend='qcompile')\n"
        "with torch.no_grad(): y = f(torch.randn(2, 64))\n"
        "assert 'qcompile' in sys.modules and y.shape == (2, 64)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_a_quantized_model_that_nobody_trains_runs_its_kernels_with_gradients_enabled():
    """`quantize` freezes a model as from_pretrained gives it, so that a forgotten no_grad costs nothing."""
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)).eval()
    ids = torch.randint(0, 16, (2, 5))
    qcompile.quantize(model, qcompile.find_recipe("w4a16").with_rules([qcompile.Rule("3.*", keep=True)]), example=ids)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    run = torch.compile(model, backend="qcompile")
    with torch.no_grad():
        want = run(ids)
    got = run(ids)
    assert torch.equal(got, want) and not got.requires_grad


def test_a_rotation_whose_size_is_no_power_of_two_is_compiled():
    """Its Hadamard matrix of 12 is a constant of the graph, which nothing but Inductor's own kernels multiplies by."""
    model = nn.Sequential(nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 64)).eval()
    x = torch.randn(16, 192)
    qcompile.quantize(model, "int8-rotated", [x], progress=False)
    assert any(getattr(module, "signs", None) is not None for module in model.modules())
    with torch.no_grad():
        found = torch.compile(model, backend="qcompile", options={"recipe": "exact"})(x)
        assert relative_error(found, model(x)) < 1e-5


@pytest.mark.parametrize("recipe", ["w4a16", "int8"])
def test_gradients_of_a_quantized_model_are_those_of_eager(recipe, monkeypatch):
    monkeypatch.setattr(dynamo, "_warned", [])
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval()
    x = torch.randn(3, 64)
    qcompile.quantize(model, recipe, example=x)
    model[1].requires_grad_(True)
    run = torch.compile(model, backend="qcompile")
    with pytest.warns(UserWarning, match="the quantized model is compiled for training.*qcompile.qa_lora"):
        run(x).square().sum().backward()
    got = model[1].weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.allclose(got, model[1].weight.grad, rtol=1e-4, atol=1e-5) and got.abs().max() > 1e-3


def test_two_models_of_one_code_are_compiled_once_each(monkeypatch):
    """Dynamo calls one graph with the weights of both."""
    compiled = []
    make = dynamo._Compiled._compile
    monkeypatch.setattr(dynamo._Compiled, "_compile", lambda self, args: compiled.append(1) or make(self, args))
    models, x = [mlp().requires_grad_(False) for _ in range(2)], torch.randn(5, 128)
    fast = [torch.compile(model, backend="qcompile", options={"on_slow_kernel": "quantize"}) for model in models]
    for _ in range(3):
        for model, run in zip(models, fast, strict=True):
            want = model(x)
            assert (run(x) - want).norm() < 0.03 * want.norm()
    assert len(compiled) == 2
    with torch.no_grad():
        models[0][0].weight.mul_(2.0)  # one model changes: its graph is compiled again, the other's is kept
    for model, run in zip(models, fast, strict=True):
        want = model(x)
        assert (run(x) - want).norm() < 0.03 * want.norm()
    assert len(compiled) == 3
