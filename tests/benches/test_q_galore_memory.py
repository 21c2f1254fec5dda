"""The bench of peak memory: what it counts as which part, in processes of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))
import q_galore_memory as bench


@pytest.mark.slow
def test_the_parts_of_adamw_are_about_what_its_tensors_hold():
    rows = bench.in_own_processes("adamw", hidden=256)
    assert rows.keys() == {"default", "returned"}
    for row in rows.values():
        weights = row["float"]
        assert 4 * (4 * 256 * 256 + 3 * 256 * 768) * 4 < weights < 16e6
        assert 0.5 * weights < row["built"] < 2 * weights
        assert row["later"] > 2.5 * weights, "moments and gradients"
        assert row["peak"] == row["built"] + max(row["first"], row["later"])


def test_a_peer_that_is_missing_is_named():
    with pytest.raises(ImportError, match="no checkout of VITA-Group/Q-GaLore was given"):
        bench.in_own_processes("reference", hidden=32)
