"""Launches that are timed: none that spills, and the fastest of them."""

from __future__ import annotations

import pytest

from qcompile.codegen.triton.kernels.spec import GemmW
from qcompile.codegen.triton.launch.tiles import launch_of
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


def test_a_launch_that_does_not_compile_is_a_problem(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in problems_by_compiling(GemmW(), launch_of(GemmW()), 90)[0]
