"""What Inductor is told: CUDA graphs where they can be had, and which inputs keep their addresses."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config as functorch
import torch._inductor.compile_fx as compile_fx
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import build

import qcompile
from qcompile.backend import dynamo
from qcompile.backend.inductor import needs_gpu, patches_of
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch import gemm
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe

kernels = torch.ops.qcompile_triton
FP8 = Format("fp8")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 64)).eval().requires_grad_(False)


@pytest.fixture
def compiled_graphs(monkeypatch):
    """Every graph that reaches Inductor's compiler, none from a cache: the graph, and what comes with it."""
    found, real = [], compile_fx.compile_fx_inner

    def spy(graph, examples, **config):
        found.append((graph, len(examples), config))
        return real(graph, examples, **config)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    with functorch.patch(enable_autograd_cache=False):
        yield found


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The model is lowered as for a GPU; its operators have CPU versions."""
    monkeypatch.setattr(dynamo, "_gpu", lambda program: torch.device("cuda"))
    monkeypatch.setattr(gemm, "gpu", lambda device: Gpu())


def test_modes():
    assert patches_of("reduce-overhead", {}) == {"triton.cudagraphs": True}
    assert patches_of("reduce-overhead", {"max_autotune": True}) == {"triton.cudagraphs": True, "max_autotune": True}
    assert patches_of("default", {"triton.cudagraphs": True}) == {"triton.cudagraphs": True}
    assert patches_of("default", {}) == {}
    with pytest.raises(ValueError, match="sets triton.cudagraphs to False"):
        patches_of("reduce-overhead", {"triton.cudagraphs": False})
    with pytest.raises(ValueError, match="kernels tune"):
        patches_of("max-autotune", {})


@pytest.mark.parametrize(
    "given", [dict(mode="reduce-overhead"), dict(options={"mode": "reduce-overhead"}),
            dict(options={"inductor": {"triton.cudagraphs": True}})]
)  # fmt: skip
def test_cuda_graphs_without_a_gpu_are_refused(given):
    with pytest.raises(Exception, match="CUDA graphs need a GPU, and the model is on the cpu"), torch.no_grad():
        torch.compile(mlp(), backend="qcompile", **given)(torch.randn(3, 128))


def test_unknown_modes_are_refused():
    with pytest.raises(Exception, match="use 'default' or 'reduce-overhead'"), torch.no_grad():
        torch.compile(mlp(), backend="qcompile", mode="max-autotune")(torch.randn(3, 128))


def test_a_gpu_is_where_the_parameters_are():
    with FakeTensorMode():
        there, here = torch.empty(3, device="cuda"), torch.empty(3)
        assert needs_gpu([there, here, 7]) is None
        assert needs_gpu([here]) is None  # a piece of a broken graph that reads no weight
        assert "the model is on the cpu" in needs_gpu([nn.Parameter(here), here])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a16", "int8"])
def test_weights_are_static_and_inputs_are_not(recipe, compiled_graphs, as_on_gpu):
    class Cached(nn.Module):
        """A cache at one address, that is read and written, and an input that is another at every call."""

        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x, cache):
            cache.add_(1)
            return self.inner(x) + cache.sum()

    model, cache = Cached().bfloat16().requires_grad_(False), torch.zeros(4)
    torch._dynamo.mark_static_address(cache)
    with torch.no_grad():
        torch.compile(model, backend="qcompile", options={"recipe": recipe})(torch.randn(3, 128).bfloat16(), cache)
    ((graph, count, config),) = compiled_graphs
    places = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    assert len(places) == count
    moving = [value for i, value in enumerate(places) if i not in config["static_input_idxs"]]
    assert [tuple(value.shape) for value in moving if isinstance(value, torch.Tensor)] == [(3, 128)]
    assert any(value.dtype in (torch.uint8, torch.int8) for value in places)  # packed weights are among the others


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [dict(mode="reduce-overhead"), dict(options={"inductor": {"triton.cudagraphs": True}})]
)
def test_cuda_graphs_are_requested_and_where_inductor_has_none_it_warns(given, monkeypatch):
    """Without the refusal Inductor meets a graph of a CPU, for which it has none."""
    requested, real = [], compile_fx.compile_fx_inner

    def spy(*given, **named):
        requested.append((compile_fx.config.triton.cudagraphs, bool(named["cudagraphs"])))
        return real(*given, **named)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    monkeypatch.setattr(dynamo, "needs_gpu", lambda inputs: None)
    with functorch.patch(enable_autograd_cache=False), torch.no_grad():
        with pytest.warns(UserWarning, match="without a CUDA graph, though they were requested"):
            torch.compile(mlp(), backend="qcompile", **given)(torch.randn(3, 128))
    assert requested == [(True, True)]


def test_formats_without_a_kernel_stay_float_on_a_gpu(as_on_gpu, monkeypatch):
    """fp8 products need sm_89; where they are missing, dequantizing before every product would only cost."""
    monkeypatch.setattr(gemm, "gpu", lambda device: Gpu("A100", 108, (8, 0)))
    model = mlp().bfloat16()
    with torch.no_grad():
        x = torch.randn(3, 128).bfloat16()
        for on_slow_kernel, quantized in (("keep_float", {False}), ("quantize", {True})):
            torch._dynamo.reset()
            recipe = Recipe("fp8", (Quantize(FP8, FP8, lm_head=FP8, lm_head_act=FP8), Fuse()))
            got = torch.compile(
                model, backend="qcompile", options={"recipe": recipe, "on_slow_kernel": on_slow_kernel}
            )(x)
            sites = dynamo.reports[-1].sites
            assert {site.quantized for site in sites} == quantized
            assert torch.allclose(got, model(x), atol=2e-2 if on_slow_kernel == "keep_float" else 2e-1)
            told = {site.reason or next(iter(site.kernel.values())) for site in sites}
            assert all("dequantize, then cuBLAS" in word for word in told)


# -- free sizes --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a16", "int8", "fp8"])
def test_one_graph_serves_every_number_of_rows(recipe, as_on_gpu, compiled_graphs):
    """Lowered as for a GPU and compiled once: the operators look at the rows that they get, and no guard does."""
    model = build("llama").half()
    reference = build("llama").half()
    reference.load_state_dict(model.state_dict())
    qcompile.quantize(reference, recipe, progress=False)
    compiled = torch.compile(
        model, backend="qcompile", dynamic=True, options={"recipe": recipe, "on_slow_kernel": "quantize"}
    )
    with torch.no_grad():
        for shape in ((2, 3), (3, 5), (4, 9), (2, 40)):
            ids = torch.randint(3, 128, shape)
            error = relative_error([compiled(ids).logits.float()], [reference(ids).logits.float()])
            assert error < 3e-2, shape
    assert len(compiled_graphs) == 1
    graph = compiled_graphs[0][0].graph
    assert sum(node.target in (kernels.linear_w.default, kernels.linear_a8.default) for node in graph.nodes) == 9
    # the graph has constants of its own, which Inductor puts before the inputs: static too, and the ids are not
    places = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    moving = [
        v
        for i, v in enumerate(places)
        if i not in compiled_graphs[0][2]["static_input_idxs"] and isinstance(v, torch.Tensor)
    ]
    assert [value.dtype for value in moving] == [torch.int64]
