"""Speed of models: what is counted, ratios, and what is written."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from qcompile.evaluation.throughput import ModelSpeed, SpeedComparison, time_models, time_text


def comparison(recipes):
    """One float candidate of round figures, and recipes half as fast."""
    speeds = {"inductor bfloat16": ModelSpeed("inductor bfloat16", 12345, [1.0, 9.0, 0.5], [1 / 4321] * 3, 60.0)}
    for name in recipes:
        speeds[f"qcompile {name} bfloat16"] = ModelSpeed(name, 12345, [2.0], [2 / 4321], 90.0)
    return SpeedComparison(speeds, dict.fromkeys(speeds, 270_000_000))


class Echo(torch.nn.Module):
    """A causal LM that counts its calls, and whose cache has the older name."""

    def __init__(self):
        super().__init__()
        self.calls, self.caches = [], []

    def forward(self, input_ids, use_cache, logits_to_keep, past_key_values=None):
        self.calls.append(input_ids.shape[1])
        self.caches.append(past_key_values)
        return SimpleNamespace(
            logits=torch.zeros(1, 1, 7), past_key_values=past_key_values or SimpleNamespace(layers=[])
        )


class Renamed(Echo):
    """The same with the name of transformers 5.24."""

    def forward(self, input_ids, use_cache, logits_to_keep, cache=None):
        found = super().forward(input_ids, use_cache, logits_to_keep, cache)
        return SimpleNamespace(logits=found.logits, cache=found.past_key_values)


def test_the_first_round_is_not_counted():
    models = {"a": Echo(), "b": Echo()}
    found = time_models(models, torch.zeros(1, 5, dtype=torch.int64), new=3, rounds=2, progress=False)
    for name, model in models.items():
        assert model.calls == [5, 1, 1, 1] * 3
        assert len(found[name].prefill) == 2 and len(found[name].decode) == 6 and found[name].first > 0


def test_a_model_for_which_there_is_no_time_is_left_out():
    models, asked = {"a": Echo(), "b": Echo(), "c": Echo()}, []

    def another(name, seconds):
        asked.append((name, seconds))
        return name != "b"

    ids = torch.zeros(1, 5, dtype=torch.int64)
    found = time_models(models, ids, new=1, rounds=1, another_model=another, progress=False)
    assert list(found) == ["a", "c"] and not models["b"].calls and len(models["c"].calls) == 4
    assert asked == [("a", 0), ("b", found["a"].first), ("c", found["a"].first)]


@pytest.mark.parametrize("kind", [Echo, Renamed])
def test_one_text(kind):
    model = kind()
    prefill, decode = time_text(model, torch.zeros(1, 4, dtype=torch.int64), 2)
    assert prefill > 0 and len(decode) == 2
    first, *others = model.caches
    assert first is None and others[0] is not None and others == [others[0]] * 2, "each token reads the cache"


def test_rates_are_medians_and_ratios_are_to_the_fastest_float():
    found = comparison(["w4a8"])
    assert found.speeds["inductor bfloat16"].prefill_rate == 12345
    cells = [list(column.cells) for column in found.table().columns]
    assert cells[3] == ["1.00", "0.50"] and cells[5] == ["1.00", "0.50"] and cells[1] == ["270", "270"]


def test_it_is_written_as_data(tmp_path):
    found = comparison(["int8"])
    found.write(tmp_path / "sub" / "s.json")
    rows = json.loads((tmp_path / "sub" / "s.json").read_text())["rows"]
    assert [r["candidate"] for r in rows] == ["inductor bfloat16", "qcompile int8 bfloat16"]
    assert rows[0]["decode_tokens_per_second"] == pytest.approx(4321) and rows[1]["first_seconds"] == 90
