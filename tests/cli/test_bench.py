"""`qcompile bench`: of models, and of exported folders."""

from __future__ import annotations

import json

import pytest

from qcompile.evaluation import throughput
from qcompile.evaluation.throughput import ModelSpeed, SpeedComparison


def comparison(model, recipes, **options):
    speeds = {"inductor bfloat16": ModelSpeed("inductor bfloat16", 12345, [1.0], [1 / 4321], 60.0)}
    for name in recipes:
        speeds[f"qcompile {name} bfloat16"] = ModelSpeed(name, 12345, [2.0], [2 / 4321], 90.0)
    return SpeedComparison(speeds, dict.fromkeys(speeds, 270_000_000))


@pytest.mark.slow
def test_folders_side_by_side(exported, folder, tmp_path, call):
    text = tmp_path / "text.txt"
    text.write_text("the of a is in to and " * 2000)
    call("export-onnx", folder, tmp_path / "l", "--last-logits", "--low-memory", "--text", text)
    few = ["--prompt", 8, "--tokens", 2, "--rounds", 1]
    out = call("bench", exported[0], "--against", tmp_path / "l", *few, "--out", tmp_path / "b.json")
    assert "decode" in out and len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 2
    with pytest.raises(ValueError, match="last token's logits only"):
        call("eval", tmp_path / "l", "--windows", 1, "--length", 32)


@pytest.mark.slow
def test_refusals(exported, folder, call):
    with pytest.raises(ValueError, match="--recipe is for a PyTorch model"):
        call("bench", exported[0], "--recipe", "int8")
    with pytest.raises(ValueError, match="--recipe is for a PyTorch model"):
        call("eval", exported[0], "--recipe", "int8")
    with pytest.raises(ValueError, match="--against is for ONNX folders"):
        call("bench", folder, "--against", exported[0])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_of_a_model_loses_no_text(terminal, folder, call, screen, monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "compare_with_inductor", comparison)
    screen(80, terminal)
    out = call("bench", folder, "-r", "w4a16-rotated-gptq", "--out", tmp_path / "s.json")
    assert "…" not in out
    for word in ("inductor", "w4a16-rotated-gptq", "bfloat16", "12345", "1.00", "4321.0", "0.50"):
        assert word in out, out
    assert len(json.loads((tmp_path / "s.json").read_text())["rows"]) == 2
