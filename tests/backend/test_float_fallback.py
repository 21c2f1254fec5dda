"""Sites whose kernel was measured to be slower than float are kept float."""

from __future__ import annotations

import pytest
import torch
from stand_in import STAND_IN
from zoo import build, example

from qcompile.analysis.facts import Facts
from qcompile.api.example_inputs import widen_batch
from qcompile.backend.float_fallback import float_fallback_sites
from qcompile.codegen.triton.launch import gemm
from qcompile.codegen.triton.launch.measured_times import remember_times, weight_only_name
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.recipe.recipe import Recipe

INT4, INT8, FP4 = Format.parse("int4/group128/zero"), Format("int8"), Format.parse("fp4/group32")
GPU = torch.device("cuda")

pytestmark = pytest.mark.usefixtures("own_cache")


def kept_float(program, recipe, device, rows):
    facts = Facts(program)
    return float_fallback_sites(facts, recipe, recipe.resolve(site.name for site in facts.sites), device, rows)


@pytest.fixture
def on_stand_in(monkeypatch):
    monkeypatch.setattr(gemm, "gpu", lambda device: STAND_IN)


def three_layers():
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 128), torch.nn.ReLU(),
                                torch.nn.Linear(128, 64)).bfloat16()  # fmt: skip
    return capture(model, (torch.randn(20, 128).bfloat16(),))


def test_sites_that_were_measured_slower_stay_float(on_stand_in):
    program = three_layers()
    recipe, layer = Recipe("all", (Quantize(INT4, None, lm_head=INT4), Fuse())), weight_only_name(4, 128, "int", "bf16")
    assert kept_float(program, recipe, GPU, None) == {}  # not measured is not slower
    remember_times(STAND_IN, layer, 64, 128, 32, {"kernel": 8.0, "dequant": 6.0, "float": 5.0})
    remember_times(STAND_IN, layer, 128, 64, 32, {"kernel": 5.2, "dequant": 6.0, "float": 5.0})  # 0.96: fast enough
    remember_times(STAND_IN, layer, 64, 128, 1, {"kernel": 2.0, "dequant": 9.0, "float": 5.0})
    found = kept_float(program, recipe, GPU, None)
    assert list(found) == ["0.weight", "4.weight"]
    assert found["0.weight"].startswith("dequant, then cuBLAS (0.83x cuBLAS) at rows 20 (dynamic): slower than")
    assert kept_float(program, recipe, GPU, 1) == {}  # decoding is what counts
    assert "rows 30 (option)" in kept_float(program, recipe, GPU, 30)["0.weight"]
    fp4 = Recipe("fp4", (Quantize(FP4, None, lm_head=FP4), Fuse()))
    assert all("dequantize, then cuBLAS" in why for why in kept_float(program, fp4, GPU, None).values())


def test_on_a_cpu_the_committed_measurements_decide():
    fp8 = Format("fp8")
    found = kept_float(three_layers(), Recipe("fp8", (Quantize(fp8, fp8, lm_head=fp8), Fuse())), None, None)
    assert set(found) == {"0.weight", "2.weight", "4.weight"}
    assert all(why.startswith("dequant_mm at") and "'quantize'} quantizes it" in why for why in found.values())


def test_a_recipe_that_quantizes_nothing_keeps_nothing_float():
    assert kept_float(three_layers(), Recipe("none", ()), None, None) == {}


def test_stacks_of_experts_have_a_kernel_on_a_gpu_for_formats_of_integers(on_stand_in):
    program = capture(build("mixtral").bfloat16(), *widen_batch((), example("mixtral")))
    found = kept_float(program, Recipe("all", (Quantize(INT8, INT8), Fuse())), GPU, None)
    assert not any("experts" in name for name in found)
    found = kept_float(program, Recipe("fp8", (Quantize(Format("fp8"), Format("fp8")), Fuse())), GPU, None)
    experts = [why for name, why in found.items() if "experts" in name]
    assert experts and all("no kernel for fp8/row weights by float x" in why for why in experts)


def test_stacks_of_experts_stay_float_on_a_cpu():
    program = capture(build("mixtral").bfloat16(), *widen_batch((), example("mixtral")))
    found = kept_float(program, Recipe("all", (Quantize(INT8, INT8), Fuse())), None, None)
    experts = [why for name, why in found.items() if "experts" in name]
    assert experts and all("a product for each expert at" in why for why in experts)
