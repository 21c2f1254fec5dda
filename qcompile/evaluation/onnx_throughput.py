"""How fast exported folders read a prompt and write tokens, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from qcompile.generation.onnx_session import Session


@dataclass(frozen=True)
class OnnxSpeed:
    """Medians, tokens a second."""

    prefill: float
    decode: float


def speeds(
    sessions: Mapping[str, Session], *, prompt: int = 512, new: int = 16, rounds: int = 5, progress: bool = True
) -> dict[str, OnnxSpeed]:
    """Time every session on one prompt and the tokens after it, all in turn; a first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for step in track(range(rounds + 1), "timing", disable=not progress, transient=True):
        for name, session in sessions.items():
            ids = np.arange(1, prompt + 1)[None] % 1000  # of any vocabulary: what they say costs no time
            start = time.perf_counter()
            _, cache = session.read(ids, None)
            read = time.perf_counter()
            for _ in range(new):
                _, cache = session.step(ids[:, :1], cache)
            done = time.perf_counter()
            if step:
                times[name].append((prompt / (read - start), new / (done - read)))
    return {
        name: OnnxSpeed(*(statistics.median(column) for column in zip(*t, strict=True))) for name, t in times.items()
    }
