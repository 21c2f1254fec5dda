"""Timing, tuning and choosing without a GPU: everything runs but the clock, the CUDA graph and the GPU's own words."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path

import pytest
import torch
from test_triton import DEVICE  # also gives the interpreter a bfloat16
from typer.testing import CliRunner
from zoo import build, example

import qcompile.codegen.triton.machine as machine_of
from qcompile.capture import capture
from qcompile.cli import app
from qcompile.cli import kernels as commands
from qcompile.codegen.triton import contenders as field_of
from qcompile.codegen.triton import search, timing, tuned, ways
from qcompile.codegen.triton.choose import Choice, choose
from qcompile.codegen.triton.launch import Launch
from qcompile.codegen.triton.lower import lower
from qcompile.codegen.triton.machine import Machine, clocks, graph_timer
from qcompile.codegen.triton.timing import Comparison, Row, Timed, compare, copies_of, interleaved, ratio
from qcompile.codegen.triton.tuned import Gpu
from qcompile.formats import Format
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline import run
from qcompile.quantize import widen_batch
from qcompile.recipe import Recipe
from qcompile.slower import slower_sites

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for a GPU that is there")
HERE = Gpu("stand-in", 132, (9, 0))
INT4, INT8 = Format.parse("int4/group128/zero"), Format("int8")


class StandIn(Machine):
    """Runs every call once, in the interpreter, and reads microseconds from a list, one for each timer in turn."""

    device, gpu, cache_bytes, there = torch.device("cpu"), HERE, 64, True

    def __init__(self, microseconds=None):
        self.microseconds, self.called = iter(microseconds or itertools.repeat(1.0)), []

    def timer(self, call, copies):
        self.called.append(copies)
        for index in range(copies):
            assert isinstance(call(index), torch.Tensor)
        value = next(self.microseconds)
        return lambda: value

    def release(self):
        pass

    def facts(self):
        return dict(gpu=self.gpu.name)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    return tmp_path


# -- the protocol ------------------------------------------------------------------------------------


def test_contenders_take_turns_and_the_first_round_does_not_count():
    order = []

    def timer(name, values):
        rest = iter(values)
        return lambda: (order.append(name), next(rest))[1]

    timers = {"a": (timer("a", [99.0, 1, 2, 3]), 1000), "b": (timer("b", [99.0, 4, 4, 4]), 500)}
    found = interleaved(timers, rounds=3)
    assert order == ["a", "b"] * 4
    assert found["a"].microseconds == 2 and found["b"] == Timed(4, 0.0, 500)
    assert found["b"].bandwidth == 125e6
    assert ratio(found["b"], found["a"]) is None  # a varied too much
    assert ratio(Timed(2, 0.01, 1), Timed(5, 0.01, 1)) == 2.5
    assert copies_of(8_700_000, 60_000_000) == 28 and copies_of(10**9, 60_000_000) == 2


class Cuda:
    """What graph_timer takes of torch.cuda, written down in order; a name that torch.cuda has not is an error."""

    def __init__(self):
        self.log = []

    def __getattr__(self, name):
        assert hasattr(torch.cuda, name), name
        log = self.log

        class Thing:
            def __init__(self, *given, **named):
                log.append(name)

            def __enter__(self):
                log.append(f"into {name}")

            def __exit__(self, *error):
                log.append(f"out of {name}")

            def __getattr__(self, method):
                assert hasattr(getattr(torch.cuda, name.replace("current_stream", "Stream")), method), (name, method)
                return lambda *given: log.append(method) or (7.0 if method == "elapsed_time" else None)

        return Thing


def test_a_cuda_graph_is_warmed_on_a_stream_of_its_own_captured_and_replayed():
    cuda, calls = Cuda(), []
    once = graph_timer(lambda i: calls.append((i, len(cuda.log))), 3, cuda)
    log = cuda.log
    assert [i for i, _ in calls] == [0, 1, 2] * 2
    assert all(log.index("into stream") < at <= log.index("out of stream") for _, at in calls[:3])
    assert all(log.index("into graph") < at <= log.index("out of graph") for _, at in calls[3:])
    assert log.index("out of stream") < log.index("into graph")
    del log[:]
    assert once() == pytest.approx(7e3 / 3)  # milliseconds of all -> microseconds of one
    assert log == ["record", "replay", "record", "synchronize", "elapsed_time"] and len(calls) == 6


def test_a_gpu_in_its_own_words(monkeypatch):
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    known = stub.split("class _CudaDeviceProperties")[1].split("\nclass ")[0]
    asked = dict(name="H200", multi_processor_count=132, major=9, minor=0, L2_cache_size=6 * 10**7, uuid="ab-cd")
    assert all(f"    {name}: " in known for name in asked)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(**asked))
    monkeypatch.setattr(machine_of, "clocks", lambda uuid: {"clocks.sm": uuid})
    assert Machine().cache_bytes == 6 * 10**7 and Machine().gpu == Gpu("H200", 132, (9, 0))
    found = Machine().facts()
    assert found["gpu"] == "H200" and found["clocks"] == {"clocks.sm": "ab-cd"} and "triton" in found
    machine_of.gpu.cache_clear()


def test_clocks_are_what_nvidia_smi_says():
    asked = []

    def run(command, **how):
        asked.append(command)
        return types.SimpleNamespace(stdout="570.1, 1980, 3201, 1980, 3201, 212.5, 700.0, 41\n")

    found = clocks("ab-cd", run)
    assert found["clocks.sm"] == "1980" and found["power.limit"] == "700.0" and found["temperature.gpu"] == "41"
    assert asked[0][0] == "nvidia-smi" and "--id=GPU-ab-cd" in asked[0]
    assert "No such file" in clocks("x", lambda *_, **__: (_ for _ in ()).throw(OSError("No such file")))["unknown"]


# -- the comparison ----------------------------------------------------------------------------------


def test_a_comparison_runs_all_that_is_here_and_names_who_is_not(tmp_path):
    kept, path = [], tmp_path / "deep" / "out.json"

    def keep(found):
        found.write(path)
        kept.append(len(json.loads(path.read_text())["rows"]))

    prices = itertools.chain([2.0], itertools.cycle([10.0, 5.0, 4.0, 4.0, 20.0, 20.0]))
    found = compare([(128, 48)], [2, 20], rounds=2, machine=StandIn(prices), keep=keep)
    few, many = found.rows
    assert kept == [1, 2] and (few.m, few.k, few.n) == (2, 128, 48)
    ours = ["cuBLAS bf16", "qcompile w4a16", "qcompile int8", "qcompile fp8"]
    assert list(many.times) == [*ours, "torch._int_mm", "torch._scaled_mm"]
    assert set(few.absent) == {"torch._weight_int4pack_mm", "torch._int_mm", "GemLite w4a16"}
    assert "more than 16 rows" in few.absent["torch._int_mm"] and "not installed" in few.absent["GemLite w4a16"]
    assert many.ratio("qcompile w4a16") == 2.0 and many.ratio("GemLite w4a16") is None
    # what w4a16 moves: half a byte a weight, one scale and zero point for 128, x and the result
    assert few.times["qcompile w4a16"].nbytes == 48 * 64 + 48 * 4 + 48 + 2 * 2 * (128 + 48)
    text = json.loads(path.read_text())
    assert text["machine"] == {"gpu": "stand-in"} == text["after"] and text["copy"]["microseconds"] == 2.0
    cells = [list(column.cells) for column in found.table().columns]
    assert cells[0] == ["128x48"] * 2 and cells[1] == ["2", "20"]
    share = few.times["qcompile w4a16"].bandwidth / found.copy.bandwidth
    assert cells[3][0] == f"5.0 (2.00x {share:.0%})" and cells[2][0] == "10.0 (1.00x)"
    assert any(word.startswith("GemLite w4a16: Absent") for word in found.words())


def test_what_fails_leaves_a_word_and_stops_nobody(monkeypatch):
    def broken(*_):
        raise RuntimeError("illegal\nmemory")

    monkeypatch.setattr(field_of, "linear_w", broken)
    found = compare([(128, 32)], [1], rounds=2, machine=StandIn())
    assert found.rows[0].absent["qcompile w4a16"] == "RuntimeError: illegal" and "qcompile fp8" in found.rows[0].times


def test_time_that_is_up_is_said(monkeypatch):
    clock = itertools.count(step=50)
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    found = compare([(128, 32)], [1, 2, 3], rounds=2, machine=StandIn(), seconds=75)
    assert [row.m for row in found.rows] == [1] and found.late == ["128x32, 2 rows", "128x32, 3 rows"]
    assert "not measured, out of time: 128x32, 3 rows" in found.words()


def test_no_ratio_where_the_machine_was_not_quiet():
    row = Row(1, 128, 32, {"cuBLAS bf16": Timed(10, 0.2, 1), "qcompile int8": Timed(5, 0.0, 1)})
    found = Comparison({}, [row], Timed(1, 0, 1))
    assert row.ratio("qcompile int8") is None and "5.0 (? " in list(found.table().columns[3].cells)[0]


def test_gemlite_is_asked_as_its_readme_says(monkeypatch):
    """Its layers here are a stand-in with the signatures of 0.6."""
    made = []

    class GemLiteLinear:
        def __init__(self, W_nbits=4, group_size=64, in_features=None, out_features=None, input_dtype=None,  # noqa: N803
                     output_dtype=None, acc_dtype=None, scaled_activations=False):  # fmt: skip
            made.append((W_nbits, group_size, in_features, out_features, input_dtype, output_dtype))

        def pack(self, W_q, scales, zeros, bias=None):  # noqa: N803
            assert W_q.dtype == torch.uint8 and W_q.shape == (32, 256) and int(W_q.max()) < 16
            assert scales.shape == zeros.shape == (32 * 2, 1)
            self.weight = ((W_q.view(64, 128) - zeros) * scales).view(32, 256)

        def __call__(self, x):
            return torch.nn.functional.linear(x, self.weight)

    dtypes = types.SimpleNamespace(BF16="bf16")
    monkeypatch.setitem(
        __import__("sys").modules, "gemlite", types.SimpleNamespace(GemLiteLinear=GemLiteLinear, DType=dtypes)
    )
    field = field_of.Field(256, 32, 2, torch.device("cpu"))
    one = dict(field_of.contenders(field, 3))["GemLite w4a16"]()
    assert one.call(1).shape == (3, 32) and made == [(4, 128, 256, 32, "bf16", "bf16")] * 2


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

    assert of(INT4) == Choice("dequant, then cuBLAS", 2.0) and not of(INT4).slower
    assert of(INT8, "int8/row") == Choice("gemm_a8", 2.0) and str(of(INT8, "int8/tensor")) == "gemm_a8 (2.00x cuBLAS)"
    assert of("fp8", "fp8/row").ratio == 0.5 and of("fp8", "fp8/row").slower
    assert of("int3/group128/zero") == Choice("gemm_w", 2.0)
    assert of("int4/group128/zero/dual", "int8/row") == Choice("gemm_a8, int8 of dual codes", 2.0)
    # other rows, shapes, formats, dtypes, GPUs: not measured, so the rule's
    for other in (of(INT4, rows=17), of(INT4, n=65), of("int4/group64/zero"), of("int4/group128"),
                  of(INT4, dtype=torch.float16), of(INT4, here=Gpu("other"))):  # fmt: skip
        assert str(other) == "gemm_w (not measured on this GPU)" and not other.slower
    assert of(INT4, rows=4).kernel == "gemv_w" and of(INT4, rows=1025).kernel == "dequant, then cuBLAS"
    # no kernel: read, written and read again, which is slower than reading float once
    for none in (of("fp4/group32"), of(INT4, dtype=torch.float32), of("fp8", "fp8/row", here=Gpu("A100", 108, (8, 0)))):
        assert none.slower and str(none) == "dequantize, then cuBLAS"


def test_measured_ways_are_taken_at_run_time(monkeypatch):
    from qcompile.codegen.triton import products

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


def test_sites_that_were_measured_slower_stay_float(monkeypatch):
    monkeypatch.setattr("qcompile.codegen.triton.products.gpu", lambda device: HERE)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 128), torch.nn.ReLU(),
                                torch.nn.Linear(128, 64)).bfloat16()  # fmt: skip
    program = capture(model, (torch.randn(20, 128).bfloat16(),))
    recipe, device = Recipe("all", (Quantize(INT4, None, output=INT4), Fuse())), torch.device("cuda")
    name = ways.by_numbers(4, 128, "int", "bf16")
    assert slower_sites(program, recipe, device, None) == {}  # not measured is not slower
    ways.remember(HERE, name, 64, 128, 32, {"kernel": 8.0, "dequant": 6.0, "float": 5.0})
    ways.remember(HERE, name, 128, 64, 32, {"kernel": 5.2, "dequant": 6.0, "float": 5.0})  # 0.96 is fast enough
    ways.remember(HERE, name, 64, 128, 1, {"kernel": 2.0, "dequant": 9.0, "float": 5.0})
    found = slower_sites(program, recipe, device, None)
    assert list(found) == ["0.weight", "4.weight"]
    assert found["0.weight"].startswith("dequant, then cuBLAS (0.83x cuBLAS) at rows 20 (dynamic): slower than")
    assert slower_sites(program, recipe, device, 1) == {}  # decoding is what counts
    assert "rows 30 (option)" in slower_sites(program, recipe, device, 30)["0.weight"]
    fp4 = Recipe("fp4", (Quantize(Format.parse("fp4/group32"), None, output=Format.parse("fp4/group32")), Fuse()))
    assert all("dequantize, then cuBLAS" in why for why in slower_sites(program, fp4, device, None).values())


def test_stacks_of_experts_stay_float_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr("qcompile.codegen.triton.products.gpu", lambda device: HERE)
    program = capture(build("mixtral").bfloat16(), *widen_batch((), example("mixtral")))
    found = slower_sites(program, Recipe("all", (Quantize(INT8, INT8), Fuse())), torch.device("cuda"), None)
    assert found and all("experts" in name and "no fast kernel" in why for name, why in found.items())


def test_the_report_says_what_was_not_measured():
    found = capture(torch.nn.Linear(128, 64).bfloat16(), (torch.randn(20, 128).bfloat16(),))
    made, _ = run(found, Recipe("all", (Quantize(INT4, None, output=INT4), Fuse())), verify=False)
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
