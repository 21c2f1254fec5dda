"""benches/encoders_cpu.py and benches/attention_cpu.py on small models: every line but the sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    import encoders_cpu

    def small():
        return torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 64))

    def rows(batch, dtype):
        return (torch.randn(batch, 64).to(dtype),)

    monkeypatch.setattr(encoders_cpu, "RESULTS", tmp_path)
    monkeypatch.setattr(encoders_cpu, "CASES", {"small": (small, rows, (2,)), "other": (small, rows, (3,))})
    monkeypatch.setattr(encoders_cpu, "limits", lambda: {"read_GBs": 1.0})
    return encoders_cpu


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--only", "nothing"], "one of"),
        (["--rounds", "0"], "at least one round"),
        (["--commit", "--only", "small"], "drop --only"),
    ],
)
def test_a_measurement_of_nothing_is_refused(bench, monkeypatch, capsys, arguments, says):
    monkeypatch.setattr("sys.argv", ["encoders_cpu.py", *arguments])
    with pytest.raises(SystemExit):
        bench.main()
    assert says in capsys.readouterr().err


@pytest.mark.exhaustive  # compiles models by Inductor
def test_what_is_written_and_printed(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["encoders_cpu.py", "--commit", "--rounds", "1"])
    bench.main()
    assert "slower than Inductor's faster float" in capsys.readouterr().out
    (written,) = tmp_path.glob("encoders_cpu-*.json")
    found = json.loads(written.read_text())
    assert {row["batch"] for row in found["rows"]} == {2, 3} and found["rounds"] == 1
    for case in ("small", "other"):
        rows = {row["candidate"]: row for row in found["rows"] if row["case"] == case}
        floats = [row["ms"] for name, row in rows.items() if name.startswith("inductor")]
        assert len(floats) == 2
        assert all(row["x_float"] == min(floats) / row["ms"] for row in rows.values())
        assert rows["qcompile int8 float32"]["sites"] == 2
    assert {"float32_mm_GMACs", "bfloat16_mm_GMACs", "read_GBs"} <= set(found["limits"])


def test_one_attention_is_measured(bench):
    import attention_cpu

    from qcompile.codegen.cpu.native_kernels import load_native_kernels

    load_native_kernels()
    for dtype in (torch.float32, torch.bfloat16):
        row = attention_cpu.measure(16, 32, dtype)
        assert row["S"] == row["T"] == 16 and row["D"] == 32 and float(str(row["us"])) > 0
