"""Speed of ONNX sessions: what is counted, and that sessions are interleaved."""

from __future__ import annotations

import pytest

from qcompile.evaluation import onnx_throughput
from qcompile.evaluation.onnx_throughput import speeds


def test_medians_of_interleaved_sessions(monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(onnx_throughput.time, "perf_counter", lambda: now[0])

    class Fake:
        def __init__(self, name, prefill, decode):
            self.name, self.prefill, self.decode = name, list(prefill), decode

        def read(self, ids, cache):
            log.append((self.name, ids.shape[1]))
            now[0] += self.prefill.pop(0)
            return None, "cache"

        def step(self, ids, cache):
            assert cache == "cache" and ids.shape[1] == 1
            now[0] += self.decode
            return None, cache

    fakes = {"a": Fake("a", [100, 1, 2, 9], 0.5), "b": Fake("b", [100, 4, 4, 4], 0.25)}  # the first round warms up
    found = speeds(fakes, prompt=8, new=2, rounds=3, progress=False)
    assert log == [("a", 8), ("b", 8)] * 4
    assert found["a"].prefill == pytest.approx(4) and found["a"].decode == pytest.approx(2)
    assert found["b"].prefill == pytest.approx(2) and found["b"].decode == pytest.approx(4)
