"""Kernels as text, as costs and as choices: everything about them that needs no GPU but the numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qcompile.codegen.triton.aot.budget as budget
import qcompile.codegen.triton.launch.tuning_cache as tuned
from qcompile.cli import app, main
from qcompile.codegen.triton.aot.compile_kernels import Built, complaints
from qcompile.codegen.triton.aot.shipped_kernels import shipped
from qcompile.codegen.triton.kernels.jit import source_file
from qcompile.codegen.triton.kernels.render import render
from qcompile.codegen.triton.kernels.spec import Dequant, Gemm8, GemmW, GemvW, Pack, RowQuant, SumK, parse
from qcompile.codegen.triton.launch.row_quant import warps
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, parts_of, regime

GOLDEN = Path(__file__).parent / "golden"
READ = [
    GemmW("bf16", zero="int", bias=True),
    GemmW("fp16", bits=3, chunk=16, group=64, scaled="weights", ragged=True, low_rank=8),
    GemmW("bf16", group=32, chunk=32, parts=True),
    GemvW("bf16", group=0, bits=8, zero="float", rows=2, residual=True),
    Gemm8("bf16", codes="fp8", act="tensor", residual=True),
    Gemm8("fp16", parts=True),
    SumK("bf16", codes="int8", bias=True),
    Dequant("bf16", bits=2, chunk=32, group=64, zero="int"),
    Pack(bits=3, group=0, chunk=16),
    Pack(bits=8, group=0, signed=True),
    RowQuant("bf16", first="layer", residual=True, codes="fp8"),
    RowQuant("bf16", first="gate", hadamard=14336),
    RowQuant("fp16", first="rms", smooth=True, codes="int4", group=128),
    RowQuant("bf16", first="rms", residual=True, value=True, smooth=True),
]


@pytest.mark.parametrize("spec", READ, ids=str)
def test_golden_sources(spec):
    """What is rendered is reviewed: QCOMPILE_GOLDEN=1 rewrites the files."""
    path = GOLDEN / (str(spec).replace("/", "-") + ".py.txt")
    if os.environ.get("QCOMPILE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(render(spec))
    assert render(spec) == path.read_text()
    assert parse(str(spec)) == spec
    assert max(map(len, render(spec).splitlines())) <= 160 and "if True" not in render(spec)


def test_every_shipped_kernel_reads_back_and_none_is_there_twice():
    for arch in (80, 90, 100):
        names = [str(kernel) for kernel in shipped(arch)]
        assert len(set(names)) == len(names)
        assert all(parse(str(kernel.spec)) == kernel.spec for kernel in shipped(arch))


@pytest.mark.parametrize(
    "text,words",
    [
        ("gemm_x/bf16", "there are gemm_w, gemv_w"),
        ("gemm_w/bf16/blob=3", "it has dtype, bits"),
        ("gemm_w/bf16/zero=some", "one of none, int, float"),
        ("gemm_w/bf16/bits=four", "is a number"),
        ("gemm_w/bf16/bits=5", "kernels for 2, 3, 4 and 8"),
        ("gemm_w/bf16/group=96/chunk=64", "crosses groups"),
        ("gemm_w/bf16/chunk=8", "at least 16"),
        ("gemm_w/bf16/parts/bias", "sum_k adds"),
        ("gemm_a8/bf16/parts/low_rank=4", "low_rank needs a whole"),
        ("row_quant/bf16/hadamard=14336/group=128", "one scale a row"),
        ("row_quant/bf16/hadamard=11008", "size k 2.m"),
        ("row_quant/bf16/group=96", "power of two"),
        ("pack/bf16/signed", "stored unsigned"),
        ("row_quant/bf16/value", "without a norm or a gate"),
    ],
)
def test_bad_kernels_are_named(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_the_source_is_a_file_that_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    path = source_file(GemmW())
    assert path.parent == tmp_path / "kernels" and path.read_text() == render(GemmW())
    before = path.stat().st_mtime_ns
    assert source_file(GemmW()) == path and path.stat().st_mtime_ns == before
    assert source_file(GemmW("fp16")) != path and len(list(path.parent.iterdir())) == 2


# -- compiled ahead of time ------------------------------------------------------------------------


def without_interpreter():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.timeout(900)
def test_all_kernels_compile_for_all_architectures_within_budget():
    command = [sys.executable, "-m", "qcompile.cli", "kernels", "check"]
    done = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    total = sum(len(list(shipped(arch))) for arch in (80, 89, 90, 100))
    assert f"{total} of {total} kernels pass" in done.stdout


GOOD = Built(registers=100, spilled=0, shared=50_000, instructions=600, mma={"wgmma": 8}, from_registers=8)


@pytest.mark.parametrize(
    "change,words",
    [
        ({}, ""),
        (dict(spilled=8), "spilled"),
        (dict(shared=240_000), "shared memory"),
        (dict(mma={}), "body is lost"),
        (dict(mma={"mma": 16}), "not by wgmma"),
        (dict(from_registers=0), "through shared memory"),
    ],
)
def test_what_must_not_be(change, words):
    spec = GemmW()
    found = complaints(spec, launch_of(spec, 16), 90, dataclasses.replace(GOOD, **change))
    assert words in "".join(found) and bool(found) == bool(words)


def test_a_lost_body_of_a_kernel_without_tensor_cores():
    tiny = dataclasses.replace(GOOD, mma={}, instructions=16)
    assert "body is lost" in complaints(GemvW(), launch_of(GemvW()), 90, tiny)[0]


def test_a_tenth_over_budget_is_found(tmp_path, monkeypatch):
    import triton

    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    budget.write([budget.Checked("k", 90, GOOD, [])])
    assert budget.over_budget("k", 90, GOOD) == []
    assert budget.over_budget("k", 90, dataclasses.replace(GOOD, registers=109)) == []
    assert "111 registers for 100" in budget.over_budget("k", 90, dataclasses.replace(GOOD, registers=111))[0]
    assert "540 instructions" not in str(budget.over_budget("k", 90, dataclasses.replace(GOOD, instructions=540)))
    assert "500 instructions" in budget.over_budget("k", 90, dataclasses.replace(GOOD, instructions=500))[0]
    assert "by nothing for wgmma" in budget.over_budget("k", 90, dataclasses.replace(GOOD, mma={}))[0]
    assert "not in budget" in budget.over_budget("k", 80, GOOD)[0]
    budget.FILE.write_text(json.dumps({"triton": triton.__version__ + "x", "kernels": {}}))
    assert budget.over_budget("k", 80, GOOD) == []  # another compiler, other numbers


def test_an_update_does_not_hide_what_must_not_be(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    dearer, spills = budget.Checked("k", 90, GOOD, [], ["dearer"]), budget.Checked("s", 90, GOOD, ["spilled"], [])
    for rows, update, code in (([dearer], [], 1), ([dearer], ["--update"], 0), ([dearer, spills], ["--update"], 1)):
        monkeypatch.setattr(budget, "check", lambda *_, rows=rows: iter(rows))
        result = CliRunner().invoke(app, ["kernels", "check", "--arch", "90", *update])
        assert result.exit_code == code and ("s: spilled" in result.output) == (spills in rows)
    assert list(budget.read()["kernels"]["90"]) == ["k"]


# -- choices -----------------------------------------------------------------------------------------


def test_regimes_and_parts():
    assert [regime(m) for m in (1, 16, 17, 64, 65, 5000)] == [16, 16, 32, 64, 128, 128]
    assert launch_of(GemmW(bits=3, chunk=16), 64, (10, 0)) != launch_of(GemmW(bits=3, chunk=16), 64, (9, 0))
    how = Launch(16, 64, 4, 4)
    assert parts_of(16, 4096, 32, how, 132) == 4  # 64 tiles
    assert parts_of(16, 14336, 32, how, 132) == 1  # 224 tiles
    assert parts_of(16, 64, 32, how, 132) == 8  # four steps at least
    assert parts_of(128, 64, 32, how, 132) == 1 and parts_of(1, 64, 1, how, 132) == 1
    assert [warps(RowQuant(), k) for k in (64, 512, 4096, 14336, 32768)] == [1, 1, 8, 16, 32]
    assert [warps(RowQuant(first="rms", value=True), k) for k in (64, 256, 4096, 14336)] == [1, 1, 16, 32]


H200 = tuned.Gpu("H200", 132, (9, 0))


def test_a_measured_launch_comes_before_the_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    spec, other = GemmW("bf16", zero="int"), Launch(16, 128, 8, 5)
    assert tuned.launch_for(H200, spec, 4096, 4096, 16) == launch_of(spec, 16)
    tuned.remember(tuned.key(H200, spec, 4096, 4096, 9), other, 3.5)
    tuned.remember(tuned.key(H200, spec, 4096, 8192, 9), Launch(16, 64, 4, 2), 3.5)
    assert tuned.launch_for(H200, spec, 4096, 4096, 16) == other
    assert tuned.launch_for(H200, dataclasses.replace(spec, bias=True, low_rank=8), 4096, 4096, 5) == other
    for gpu, what, n, rows in (
        (dataclasses.replace(H200, name="L4"), spec, 4096, 16), (H200, GemmW("bf16"), 4096, 16),
        (H200, spec, 4095, 16), (H200, spec, 4096, 17),
    ):  # fmt: skip
        assert tuned.launch_for(gpu, what, n, 4096, rows) == launch_of(what, rows)
    assert len(json.loads(tuned.file().read_text())) == 2


def test_candidates_that_spill_are_not_timed():
    spec = GemmW("bf16")
    all_of_them = list(tuned.candidates(spec, 32, (9, 0)))
    assert all_of_them[0] == launch_of(spec, 32) and len(set(all_of_them)) == len(all_of_them) > 8
    assert max(how.rows for how in all_of_them) == 32
    left = tuned.sound(spec, all_of_them, (9, 0), lambda s, how, arch: ["spills"] * (how.stages > 2 or arch != 90))
    assert left and {how.stages for how in left} == {2}
    assert tuned.fastest(left, lambda how: -how.channels) == (next(h for h in left if h.channels == 128), -128)
    with pytest.raises(ValueError, match="nothing to time"):
        tuned.fastest([], lambda how: 1.0)
