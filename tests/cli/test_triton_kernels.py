"""`qcompile kernels`: what is listed and printed, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from stand_in import StandIn

from qcompile.cli import app
from qcompile.codegen.triton.kernels.render import render
from qcompile.codegen.triton.kernels.spec import GemmW
from qcompile.codegen.triton.launch import tuning_cache
from qcompile.codegen.triton.launch.tiles import Launch
from qcompile.codegen.triton.tuning import autotune, gemm_benchmark


def test_commands(call):
    assert call("kernels", "show", "gemm_w/fp16/bias") == render(GemmW("fp16", bias=True))
    assert "gemm_a8/bf16/codes=fp8" in call("kernels", "list")
    assert "fp8" not in call("kernels", "list", "--arch", "80")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["show", "gemm"], "no template 'gemm'"),
        (["check"], "TRITON_INTERPRET"),
        (["bench"], "no GPU here"),
        (["tune"], "no GPU here"),
        (["bench", "--shapes", "4096"], "write 4096x4096"),
        (["tune", "--recipes", "exact"], "none rounds weights to nearest"),
    ],
)
def test_errors_are_one_line(arguments, words, monkeypatch, fail):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in fail("kernels", *arguments)


@pytest.mark.parametrize(
    "arguments,words",
    [(["--arch", "x"], "no list of compute capabilities"), (["--only", "zzz"], "no kernel's name contains this")],
)
def test_a_check_of_nothing_is_an_error(arguments, words, monkeypatch, fail):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in fail("kernels", "check", *arguments)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_list_loses_no_text(terminal, call, screen):
    """Names of kernels, tiles and figures are whole, on 80 columns and in a pipe."""
    from qcompile.codegen.triton.aot.shipped_kernels import shipped

    screen(80, terminal)
    out = call("kernels", "list")
    assert "…" not in out and "..." not in out
    for kernel in shipped(90):
        spec, _, tile = str(kernel).partition(" ")
        assert spec in out and all(word in out for word in tile.split())
    assert max(map(len, out.splitlines())) <= (80 if terminal else 200)


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_of_timing_lose_no_text(terminal, screen, capsys):
    from qcompile.cli.output import print_table
    from qcompile.codegen.triton.tuning.gemm_benchmark import GemmComparison, GemmTiming, Timed

    names = ["cuBLAS bf16", "qcompile w4a16", "qcompile int8", "torch int4 tinygemm", "torch int8", "GemLite int4"]
    times = {name: Timed(1234.5 + index, 0.01, 10**9) for index, name in enumerate(names)}
    rows = [GemmTiming(m, 14336, 4096, times, {"GemLite int8": "not installed"}) for m in (1, 2048)]
    screen(80, terminal)
    print_table(GemmComparison({}, rows, Timed(100.0, 0.01, 10**8)).table())
    out = capsys.readouterr().out
    assert "…" not in out and "14336x4096" in out and "2048" in out
    for index in range(len(names)):
        assert out.count(f"{1234.5 + index:.1f}") == 2
    for word in " ".join([*names, "GemLite int8"]).split():
        assert word in out


def test_formats_of_recipes_are_named_once():
    from qcompile.cli.triton_kernels import _formats

    found = _formats("w4a16, w4a16,int8")
    assert [act for _, act in found] == ["", "int8/row"] and len(found) == 2


def test_the_group_needs_a_command():
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["kernels"])
    assert result.exit_code == 2 and "list" in result.output


@pytest.fixture
def on_stand_in(monkeypatch, own_cache):
    """Timing runs in the interpreter, on what stands in for a GPU."""
    import kernel_cases  # a correct bfloat16

    if kernel_cases.DEVICE == "cuda":
        pytest.skip("a stand-in for a GPU that is there")

    def problems(spec, launch, architecture):
        return ["spills"] * (launch != Launch(16, 64, 4, 4))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(autotune, "TimedGpu", StandIn)
    monkeypatch.setattr(gemm_benchmark, "TimedGpu", StandIn)
    monkeypatch.setattr(autotune, "problems_by_compiling", problems)


def test_the_bench_command(on_stand_in, call, screen, tmp_path):
    out = tmp_path / "bench.json"
    screen(250, False)
    text = call("kernels", "bench", "--shapes", "128x32", "--rows", "1,20", "--out", out)
    assert "GemLite is not installed" in text and "128x32" in text and len(json.loads(out.read_text())["rows"]) == 2


def test_the_tune_command(on_stand_in, call, screen):
    screen(250, False)
    text = call("kernels", "tune", "--shapes", "128x64", "--rows", "1,16", "--recipes", "w4a16,int8")
    assert "int4 weights, groups of 128" in text and "16x64" in text
    assert str(tuning_cache.file()) in text.replace("\n", "")
    kept = json.loads(tuning_cache.file().read_text())
    assert len(kept) == 1 + 2 * 2  # one launch; two formats at two M
    assert {tuple(sorted(v)) for v in kept.values()} == {
        ("launch", "microseconds"), ("dequant", "float", "kernel"), ("float", "kernel")
    }  # fmt: skip


@pytest.mark.parametrize("command", [["tune", "--recipes", "w4a16,w8a16,int8,fp8,w4a8,w4a4-groups"], ["bench"]])
def test_timing_draws_nothing_from_the_callers_generator(command, on_stand_in, call):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    call("kernels", *command, "--shapes", "128x64", "--rows", "16")
    assert torch.equal(torch.get_rng_state(), before)
