"""The demo: its budget by a clock that the test moves, and the whole run with stubs in place of the slow parts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from qcompile.api import export_onnx, quantize, verify_model
from qcompile.calibration import text
from qcompile.cli import demo
from qcompile.cli.demo import EAGER, INT4, RECIPES, ROUNDS, STAGES, Budget, run
from qcompile.evaluation import perplexity, throughput
from qcompile.evaluation.throughput import ModelSpeed, time_models
from qcompile.generation import onnx_session, pretrained
from qcompile.recipe.report import Report, SiteReport


class Clock:
    """Seconds that only `work` moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, seconds, result=None):
        self.now += seconds
        return result


def test_time_that_a_stage_saves_is_the_next_ones():
    clock = Clock()
    budget = Budget({"a": 10, "b": 20}, clock)
    assert budget.begin("a") == "stage a: until 10 s" and budget.left == 10
    clock.work(4)
    assert budget.elapsed == 4 and budget.affords(6) and not budget.affords(6.1)
    budget.begin("b")
    assert budget.left == 26
    clock.work(30)
    assert budget.left == -4 and not budget.affords(0.1)


@pytest.mark.parametrize(
    "used,seconds,share,count",
    [(0, 1, 1.0, 5), (0, 4, 1.0, 2), (0, 4, 0.5, 1), (0, 100, 1.0, 1), (50, 1, 1.0, 1), (0, 0, 1.0, 5)],
)
def test_pieces_of_work_are_as_many_as_fit_and_at_least_one(used, seconds, share, count):
    clock = Clock()
    budget = Budget({"a": 10}, clock)
    budget.begin("a")
    clock.work(used)
    assert budget.how_many(5, seconds, share) == count


@pytest.mark.parametrize("round_seconds,rounds", [(1, 5), (3, 3), (11, 1), (1000, 1)])
def test_rounds_end_with_the_budget(round_seconds, rounds, monkeypatch):
    """A budget of ten seconds; the first round warms up, and one is counted however long it takes."""
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", clock)
    budget = Budget({"speed": 10 + round_seconds}, clock)
    budget.begin("speed")

    def model(input_ids, **more):
        clock.work(round_seconds / 4)
        return SimpleNamespace(logits=torch.zeros(1, 1, 7), past_key_values=SimpleNamespace(layers=[]))

    found = time_models(
        {"a": model, "b": model}, torch.zeros(1, 5, dtype=torch.int64), new=1, rounds=5,
        another_round=budget.affords, progress=False,
    )  # fmt: skip
    assert [len(speed.prefill) for speed in found.values()] == [rounds] * 2
    assert found["a"].prefill_rate == pytest.approx(5 / (round_seconds / 4))


@pytest.fixture
def stubs(monkeypatch):
    """The slow parts of the demo take the seconds that a machine of this slowness needs."""

    def use(clock, slowness):
        ran = {"windows": [], "recipes": []}
        model = torch.nn.Linear(2, 2)
        model.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=7)
        model.generate = lambda **inputs: torch.tensor([[1, 2, 3, 4]])
        model.__deepcopy__ = lambda memory: model

        class Inputs(dict):
            input_ids = torch.tensor([[1, 2]])

        class Tokenizer:
            def __call__(self, prompt, return_tensors):
                return Inputs()

            def decode(self, ids, skip_special_tokens):
                return f" {ids}"

        def loss(model, pieces, **options):
            ran["windows"].append(len(pieces))
            return clock.work(slowness * len(pieces), 13.0)

        def quantized(model, name, data, **options):
            ran["recipes"].append(name)
            sites = [SiteReport("a", 4, 4, weight="int8/row", bytes_before=64, bytes_after=16)]
            return clock.work(20 * slowness, Report(name, sites))

        def timed(candidates, ids, *, rounds, another_round, another_model, **options):
            count, compiled = 0, []
            for name in candidates:
                if another_model(name, 20 * slowness if INT4 in compiled else 0):
                    compiled.append(name)
                    clock.work(0 if name in ("float32", EAGER) else 20 * slowness)
            while count < rounds and (not count or another_round(6 * slowness)):
                count += 1
                clock.work(6 * slowness)
            return {name: ModelSpeed(name, 512, [1.0] * count, [0.1] * count) for name in compiled}

        session = SimpleNamespace(stream=lambda ids, new: iter([3, 4]))
        report = Report("float", metrics={"onnx relative error": 1e-6})
        monkeypatch.setattr(pretrained, "load_pretrained", lambda: (model, Tokenizer()))
        monkeypatch.setattr(text, "windows", lambda *a, count, **k: [torch.zeros(1, 64)] * count)
        monkeypatch.setattr(text, "batches", lambda tokenizer: [])
        monkeypatch.setattr(perplexity, "perplexity", loss)
        monkeypatch.setattr(quantize, "quantize", quantized)
        monkeypatch.setattr(verify_model, "verify_model", lambda *a: clock.work(5 * slowness, Report("exact")))
        monkeypatch.setattr(export_onnx, "export_onnx", lambda *a, **k: clock.work(20 * slowness, report))
        monkeypatch.setattr(onnx_session, "Session", lambda folder: session)
        monkeypatch.setattr(throughput, "time_models", timed)
        monkeypatch.setattr(torch, "compile", lambda model, **options: model)
        return ran

    return use


@pytest.mark.parametrize(
    "slowness,windows,rounds,left_out",
    [(1, 2, ROUNDS, []), (2.5, 2, ROUNDS, []), (3.2, 2, 2, []), (4, 2, 1, ["int8"]), (30, 1, 1, ["bfloat16", "int8"])],
)
def test_a_slow_machine_drops_windows_rounds_and_models_to_compile(
    slowness, windows, rounds, left_out, stubs, tmp_path, capsys
):
    clock = Clock()
    ran = stubs(clock, slowness)
    found = run(tmp_path, Budget(STAGES, clock))
    assert ran["recipes"] == list(RECIPES) and set(found["perplexity"]) == {"float32", "bfloat16", *RECIPES}
    assert set(found["tokens_per_second"]) == {"float32", EAGER, "bfloat16", *RECIPES} - set(left_out)
    assert ran["windows"] == ([1] * 4 if windows == 1 else [1, *[windows] * 4])
    assert set(found["rounds"].values()) == {rounds}
    if slowness < 4:
        assert found["seconds"] <= sum(STAGES.values())
    out = capsys.readouterr().out
    assert all((f"{name} is not timed" in out) == (name in left_out) for name in ("bfloat16", "int8"))
    assert "PyTorch and ONNX Runtime generate the same 2 tokens" in out and "stage speed: until 470 s" in out
    assert json.loads((tmp_path / "demo.json").read_text())["samples"] == {
        f"PyTorch, {INT4}": "The capital of France is [3, 4]",
        f"ONNX Runtime, {INT4}": "The capital of France is [3, 4]",
    }
    assert (tmp_path / "tradeoff.png").is_file()


def test_other_texts_are_explained(stubs, tmp_path, monkeypatch, capsys):
    stubs(Clock(), 1)
    monkeypatch.setattr(onnx_session, "Session", lambda folder: SimpleNamespace(stream=lambda ids, new: iter([3, 5])))
    run(tmp_path, Budget(STAGES, Clock()))
    assert "the texts differ from token 2 on" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_loses_no_text(terminal, screen, stubs, tmp_path, capsys):
    screen(80, terminal)
    clock = Clock()
    stubs(clock, 1)
    run(tmp_path, Budget(STAGES, clock))
    out = capsys.readouterr().out
    assert "…" not in out
    for word in (INT4, "(qcompile)", "bfloat16", "(Inductor)", "512", "10.0", "13.00", "+0.0%", "prefill"):
        assert word in out


def test_the_command_halves_the_budget_for_quick(monkeypatch, call, tmp_path):
    started = []
    monkeypatch.setattr(demo, "run", lambda out, budget, *, quick: started.append((budget.stages, quick)))
    call("demo", "--out", tmp_path)
    call("demo", "--quick")
    assert started[0] == (STAGES, False) and started[1] == ({n: s / 2 for n, s in STAGES.items()}, True)
