"""Rendered kernels as files of the user's cache."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile.codegen.triton.kernels.jit import source_file
from qcompile.codegen.triton.kernels.render import render
from qcompile.codegen.triton.kernels.spec import GemmW


def test_the_source_is_a_file_that_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    path = source_file(GemmW())
    assert path.parent == tmp_path / "kernels" and path.read_text() == render(GemmW())
    before = path.stat().st_mtime_ns
    assert source_file(GemmW()) == path and path.stat().st_mtime_ns == before
    assert source_file(GemmW("fp16")) != path and len(list(path.parent.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_jit_compiles_every_launch_for_the_sizes_that_it_specializes(architecture):
    """On a driver without a GPU: an M of 1, which becomes a constant, and multiples of 16, are kernels of their own."""
    script = Path(__file__).parents[1] / "launch_all.py"
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, str(architecture)], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    by_name = collections.Counter(name for name, *_ in launches)
    assert by_name["pack"] == 10 and by_name["dequant"] == 6 and by_name["gemm_w"] == 30
    assert by_name["gemm_a8"] == 18 * (1 if architecture < 89 else 2) and by_name["sum_k"] > 3
    fp8 = architecture >= 89
    assert (by_name["gemm_group"], by_name["gemm_fp4_fp8"], by_name["gemm_experts"]) == (20, 10 * fp8, 40)
    assert (by_name["gemm_experts_a8"], by_name["gemm_experts_w4a8"]) == (10 + 10 * fp8, 10)
    one_row = [signature["M"] for name, _, _, signature in launches if name == "gemm_w"]
    assert one_row.count("constexpr") == 6 and one_row.count("i32") == 24
    assert all(min(grid) >= 1 for _, grid, _, _ in launches)
