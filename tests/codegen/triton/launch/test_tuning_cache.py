"""Measured launches come before the table's, for exactly what was measured."""

from __future__ import annotations

import dataclasses
import json

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.spec import GemmW
from qcompile.codegen.triton.launch import tuning_cache
from qcompile.codegen.triton.launch.tiles import Launch, launch_of
from qcompile.codegen.triton.launch.tuning_cache import key, launch_for, remember_launch

H200 = Gpu("H200", 132, (9, 0))


def test_a_measured_launch_comes_before_the_tables(own_cache):
    spec, other = GemmW("bf16", zero="int"), Launch(16, 128, 8, 5)
    assert launch_for(H200, spec, 4096, 4096, 16) == launch_of(spec, 16)
    remember_launch(key(H200, spec, 4096, 4096, 9), other, 3.5)
    remember_launch(key(H200, spec, 4096, 8192, 9), Launch(16, 64, 4, 2), 3.5)
    assert launch_for(H200, spec, 4096, 4096, 16) == other
    assert launch_for(H200, dataclasses.replace(spec, bias=True, low_rank=8), 4096, 4096, 5) == other
    for gpu, what, n, m in (
        (dataclasses.replace(H200, name="L4"), spec, 4096, 16), (H200, GemmW("bf16"), 4096, 16),
        (H200, spec, 4095, 16), (H200, spec, 4096, 17),
    ):  # fmt: skip
        assert launch_for(gpu, what, n, 4096, m) == launch_of(what, m)
    assert len(json.loads(tuning_cache.file().read_text())) == 2


def test_an_entry_with_other_sizes_is_not_measured(own_cache):
    spec = GemmW("bf16")
    tuning_cache.write(key(H200, spec, 64, 64, 16), dict(launch=dict(rows=16, channels=64), microseconds=1.0))
    assert launch_for(H200, spec, 64, 64, 16) == launch_of(spec, 16)
