"""Tuning launches, measuring ways and choosing by what was measured, and the commands for it, without a GPU."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from stand_in import HERE, StandIn
from test_triton import DEVICE  # also gives the interpreter a bfloat16
from typer.testing import CliRunner
from zoo import build, example

from qcompile.analysis.facts import Facts
from qcompile.api.example_inputs import widen_batch
from qcompile.backend.float_fallback import float_fallback_sites
from qcompile.cli import app
from qcompile.cli import triton_kernels as commands
from qcompile.codegen.triton.gpu_kernel_choice import GpuChoice, choose
from qcompile.codegen.triton.gpu_lowering import lower
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch import gemm
from qcompile.codegen.triton.launch import measured_times as ways
from qcompile.codegen.triton.launch import tuning_cache as tuned
from qcompile.codegen.triton.launch.tiles import Launch
from qcompile.codegen.triton.tuning import autotune as search
from qcompile.codegen.triton.tuning import baselines as field_of
from qcompile.codegen.triton.tuning import gemm_benchmark as timing
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for a GPU that is there"),
    pytest.mark.usefixtures("own_cache"),
]
INT4, INT8 = Format.parse("int4/group128/zero"), Format("int8")


# -- tuning and choosing -----------------------------------------------------------------------------


def test_tuning_keeps_the_fastest_launch():
    def problems(spec, how, architecture):
        return [] if (how.rows, how.warps) == (16, 4) and how.channels == 64 and how.stages < 4 else ["spills"]

    found = search.tune([(128, 64)], [7], rounds=1, machine=StandIn([9.0, 3.0]), problems=problems)
    assert [(how, us) for _, how, us in found] == [(Launch(16, 64, 4, 3), 3.0)]
    weight = field_of.random_weight(INT4, 128, 64, torch.device("cpu"))
    spec = search.scaled(search.GemmW("bf16", **weight.fields), 7)
    assert tuned.launch_for(HERE, spec, 64, 128, 16) == Launch(16, 64, 4, 3)


FORMATS = [(INT4, ""), (INT8, "int8/row"), (Format("fp8"), "fp8/row"), (Format.parse("int3/group128/zero"), "")]


def test_ways_are_measured_and_decide(monkeypatch):
    asked, real = [], search.linear_w
    monkeypatch.setattr(search, "linear_w", lambda *given, way: (asked.append(way), real(*given, way=way))[1])
    # of every format in turn: kernel, [dequant,] float
    prices = [8.0, 2.0, 4.0, 3.0, 6.0, 6.0, 3.0, 1.0, 5.0, 2.0]
    machine = StandIn(prices)
    found = search.measure(FORMATS, [(128, 64)], [15, 16], rounds=2, machine=machine)
    assert [one.m for one in found] == [16] * 4 and all(one.kept for one in found) and len(machine.called) == 10
    copies = machine.called[0]
    assert asked == 2 * (["kernel"] * copies + ["dequant"] * copies)

    def of(form, act="", rows=9, n=64, dtype=torch.bfloat16, here=HERE):
        return choose(here, Format.parse(str(form)), act, dtype, rows, 128, n)

    assert of(INT4) == GpuChoice("dequant, then cuBLAS", 2.0) and not of(INT4).slower_than_float
    assert (
        of(INT8, "int8/row") == GpuChoice("gemm_a8", 2.0) and str(of(INT8, "int8/tensor")) == "gemm_a8 (2.00x cuBLAS)"
    )
    assert of("fp8", "fp8/row").ratio == 0.5 and of("fp8", "fp8/row").slower_than_float
    assert of("int3/group128/zero") == GpuChoice("gemm_w", 2.0)
    assert of("int4/group128/zero/dual", "int8/row") == GpuChoice("gemm_a8, int8 of dual codes", 2.0)
    # other rows, shapes, formats, dtypes, GPUs: not measured, so the rule's
    for other in (of(INT4, rows=17), of(INT4, n=65), of("int4/group64/zero"), of("int4/group128"),
                  of(INT4, dtype=torch.float16), of(INT4, here=Gpu("other"))):  # fmt: skip
        assert str(other) == "gemm_w (not measured on this GPU)" and not other.slower_than_float
    assert of(INT4, rows=4).kernel == "gemv_w" and of(INT4, rows=1025).kernel == "dequant, then cuBLAS"
    # no kernel: read, written and read again, which is slower than reading float once
    for none in (of("fp4/group32"), of(INT4, dtype=torch.float32), of("fp8", "fp8/row", here=Gpu("A100", 108, (8, 0)))):
        assert none.slower_than_float and str(none) == "dequantize, then cuBLAS"


def test_measured_ways_are_taken_at_run_time(monkeypatch):
    from qcompile.codegen.triton.launch import gemm as products

    weight = field_of.random_weight(INT4, 128, 64, torch.device("cpu"))
    x, taken = torch.randn(9, 128).bfloat16(), []
    monkeypatch.setattr(products, "gpu", lambda device: HERE)
    real = products._by_cublas
    monkeypatch.setattr(products, "_by_cublas", lambda *given: taken.append(1) or real(*given))
    first = products.linear_w(x, weight, products.Epilogue())
    ways.remember(HERE, ways.by_numbers(4, 128, "int", "bf16"), 64, 128, 16, {"kernel": 3.0, "dequant": 2.0})
    second = products.linear_w(x, weight, products.Epilogue())
    assert taken == [1] and torch.allclose(first, second, rtol=2e-2, atol=2e-2)
    ways.remember(HERE, ways.by_numbers(4, 128, "int", "bf16"), 64, 128, 4096, {"kernel": 2.0, "dequant": 3.0})
    assert not ways.dequantizes(HERE, ways.by_numbers(4, 128, "int", "bf16"), 64, 128, 2000)


def test_a_wide_spread_is_not_kept():
    class Loud(StandIn):
        def timer(self, call, copies):
            rest = itertools.cycle([1.0, 2.0, 3.0])
            return lambda: next(rest)

    (found,) = search.measure([(INT4, "")], [(128, 64)], [16], rounds=3, machine=Loud())
    assert not found.kept and not tuned.file().exists()


def test_formats_without_a_kernel_are_refused_before_work():
    machine = StandIn()
    with pytest.raises(ValueError, match="fp4.*no kernel"):
        search.measure([(INT4, ""), (Format.parse("fp4/group32"), "")], [(128, 64)], [16], machine=machine)
    assert not machine.called


def kept_float(program, recipe, device, rows):
    facts = Facts(program)
    return float_fallback_sites(facts, recipe, recipe.resolve(site.name for site in facts.sites), device, rows)


def test_sites_that_were_measured_slower_stay_float(monkeypatch):
    monkeypatch.setattr(gemm, "gpu", lambda device: HERE)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 128), torch.nn.ReLU(),
                                torch.nn.Linear(128, 64)).bfloat16()  # fmt: skip
    program = capture(model, (torch.randn(20, 128).bfloat16(),))
    recipe, device = Recipe("all", (Quantize(INT4, None, lm_head=INT4), Fuse())), torch.device("cuda")
    name = ways.by_numbers(4, 128, "int", "bf16")
    assert kept_float(program, recipe, device, None) == {}  # not measured is not slower
    ways.remember(HERE, name, 64, 128, 32, {"kernel": 8.0, "dequant": 6.0, "float": 5.0})
    ways.remember(HERE, name, 128, 64, 32, {"kernel": 5.2, "dequant": 6.0, "float": 5.0})  # 0.96 is fast enough
    ways.remember(HERE, name, 64, 128, 1, {"kernel": 2.0, "dequant": 9.0, "float": 5.0})
    found = kept_float(program, recipe, device, None)
    assert list(found) == ["0.weight", "4.weight"]
    assert found["0.weight"].startswith("dequant, then cuBLAS (0.83x cuBLAS) at rows 20 (dynamic): slower than")
    assert kept_float(program, recipe, device, 1) == {}  # decoding is what counts
    assert "rows 30 (option)" in kept_float(program, recipe, device, 30)["0.weight"]
    fp4 = Recipe("fp4", (Quantize(Format.parse("fp4/group32"), None, lm_head=Format.parse("fp4/group32")), Fuse()))
    assert all("dequantize, then cuBLAS" in why for why in kept_float(program, fp4, device, None).values())


def test_stacks_of_experts_stay_float_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(gemm, "gpu", lambda device: HERE)
    program = capture(build("mixtral").bfloat16(), *widen_batch((), example("mixtral")))
    found = kept_float(program, Recipe("all", (Quantize(INT8, INT8), Fuse())), torch.device("cuda"), None)
    assert found and all("experts" in name and "no fast kernel" in why for name, why in found.items())


def test_the_report_says_what_was_not_measured():
    found = capture(torch.nn.Linear(128, 64).bfloat16(), (torch.randn(20, 128).bfloat16(),))
    made, _ = run(found, Recipe("all", (Quantize(INT4, None, lm_head=INT4), Fuse())), verify=False)
    chosen = lower(made, lambda kind, held, make: make(), HERE)
    assert chosen == {"weight": {"rows 20 (dynamic)": "gemm_w (not measured on this GPU)"}}


# -- the command line --------------------------------------------------------------------------------


@pytest.fixture
def on_stand_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(search, "Machine", StandIn)
    monkeypatch.setattr(timing, "Machine", StandIn)
    monkeypatch.setattr(search, "problems_of", lambda spec, how, architecture: ["x"] * (how != Launch(16, 64, 4, 4)))
    monkeypatch.setattr(commands.console, "width", 250)


def called(*arguments):
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_the_bench_command(on_stand_in, tmp_path):
    out = tmp_path / "bench.json"
    text = called("bench", "--shapes", "128x32", "--rows", "1,20", "--out", str(out))
    assert "GemLite is not installed" in text and "128x32" in text and len(json.loads(out.read_text())["rows"]) == 2


def test_the_tune_command(on_stand_in):
    text = called("tune", "--shapes", "128x64", "--rows", "1,16", "--recipes", "w4a16,int8")
    assert "int4 weights, groups of 128" in text and "16x64" in text and str(tuned.file()) in text.replace("\n", "")
    kept = json.loads(tuned.file().read_text())
    assert len(kept) == 1 + 2 * 2  # one launch; two formats at two places
    assert {tuple(sorted(v)) for v in kept.values()} == {
        ("launch", "microseconds"), ("dequant", "float", "kernel"), ("float", "kernel")
    }  # fmt: skip
    result = CliRunner().invoke(app, ["kernels", "tune", "--recipes", "fold-norm"])
    assert result.exit_code != 0
