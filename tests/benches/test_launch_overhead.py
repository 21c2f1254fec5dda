"""The bench of launches: every operator's CUDA version is what is timed, and what is written can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[2] / "benches"

SMALL = """
import sys
sys.path.insert(0, {benches!r})
from pathlib import Path
import launch_overhead as bench
bench.N = bench.K = 256
bench.CALLS, bench.ROUNDS, bench.RESULTS = 2, 1, Path({folder!r})
sys.argv = ["launch_overhead.py", "--commit"]
bench.main()
"""


@pytest.mark.slow
def test_every_operator_is_timed_and_written(tmp_path):
    code = SMALL.format(benches=str(BENCHES), folder=str(tmp_path))
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "launch_overhead.json").read_text())
    names = " ".join(found["microseconds"])
    assert all(word in names for word in ("linear_w", "linear_a8", "row_quant", "Triton"))
    assert all(value > 0 for value in found["microseconds"].values()) and found["versions"]["triton"]
