"""Launches that are timed: none that spills, and the fastest of them."""

from __future__ import annotations

import pytest

from qcompile.codegen.triton.aot.compile_kernels import KernelCost
from qcompile.codegen.triton.kernels.spec import GemmW
from qcompile.codegen.triton.launch.tiles import launch_of
from qcompile.codegen.triton.tuning import launch_candidates
from qcompile.codegen.triton.tuning.launch_candidates import (
    candidates,
    fastest,
    problems_by_compiling,
    without_problems,
)


def test_candidates_that_spill_are_not_timed():
    spec = GemmW("bf16")
    launches = list(candidates(spec, 32, (9, 0)))
    assert launches[0] == launch_of(spec, 32) and len(set(launches)) == len(launches) > 8
    assert max(launch.block_m for launch in launches) == 32

    def problems(spec, launch, architecture):
        return ["spills"] * (launch.num_stages > 2 or architecture != 90)

    sound = without_problems(spec, launches, (9, 0), problems)
    assert sound and {launch.num_stages for launch in sound} == {2}
    widest = next(launch for launch in sound if launch.block_n == 256)
    assert fastest(sound, lambda launch: -launch.block_n) == (widest, -256)
    with pytest.raises(ValueError, match="nothing to time"):
        fastest([], lambda launch: 1.0)


def test_a_candidate_of_many_shapes_and_rows_is_compiled_once(monkeypatch):
    """65 launches of 3 shapes and 8 regimes of M would take a GPU's 20 minutes; one that failed is tried again."""
    compiled = []
    cost = KernelCost(100, 0, 1000, 600, {"wgmma": 8}, from_registers=8, together=4, loop={})

    def compile_kernel(spec, launch, architecture):
        compiled.append(launch)
        if launch.num_stages == 5:
            raise RuntimeError("no such stage")
        return cost

    monkeypatch.setattr(launch_candidates, "compile_kernel", compile_kernel)
    launch_candidates._complaints.cache_clear()
    spec = GemmW("bf16", group=64)
    for m in (16, 32, 32):
        sound = without_problems(spec, candidates(spec, m, (9, 0)), (9, 0), problems_by_compiling)
        assert sound == [launch for launch in candidates(spec, m, (9, 0)) if launch.num_stages < 5]
    good = [launch for launch in compiled if launch.num_stages < 5]
    assert len(set(good)) == len(good) and len(compiled) - len(good) > 3
    launch_candidates._complaints.cache_clear()


def test_a_launch_that_does_not_compile_is_a_problem(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in problems_by_compiling(GemmW(), launch_of(GemmW()), 90)[0]
