"""How kernels are timed and compared, without a GPU: all runs but the clock, the CUDA graph and its own words."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path

import pytest
import torch
from stand_in import StandIn
from test_triton import DEVICE  # also gives the interpreter a bfloat16

import qcompile.codegen.triton.tuning.gpu_timer as machine_of
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.tuning import baselines as field_of
from qcompile.codegen.triton.tuning import gemm_benchmark as timing
from qcompile.codegen.triton.tuning.gemm_benchmark import (
    GemmComparison,
    GemmTiming,
    Timed,
    compare,
    copies_of,
    interleaved,
    ratio,
)
from qcompile.codegen.triton.tuning.gpu_timer import Machine, clocks, graph_timer

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in for a GPU that is there"),
    pytest.mark.usefixtures("own_cache"),
]


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
    row = GemmTiming(1, 128, 32, {"cuBLAS bf16": Timed(10, 0.2, 1), "qcompile int8": Timed(5, 0.0, 1)})
    found = GemmComparison({}, [row], Timed(1, 0, 1))
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
