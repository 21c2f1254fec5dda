"""Prefill and decode speed of exported ONNX folders, interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from qcompile.evaluation.throughput import check_counts
from qcompile.generation.onnx_session import Session


@dataclass(frozen=True)
class OnnxSpeed:
    """Medians, tokens per second."""

    prefill: float
    decode: float


def speeds(
    sessions: Mapping[str, Session], *, prompt: int = 512, new: int = 16, rounds: int = 5, progress: bool = True
) -> dict[str, OnnxSpeed]:
    """Time sessions on one prompt and the tokens after it, interleaved.

    Args:
        sessions: by name.
        prompt: its length in tokens.
        new: tokens to decode after it.
        rounds: counted rounds; one more warms up.
        progress: show a bar.

    Raises:
        ValueError: nothing to time.
        FolderError: more tokens than a folder's tables of positions reach.
    """
    check_counts(prompt, new, rounds)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for step in track(range(rounds + 1), "timing", disable=not progress, transient=True):
        for name, session in sessions.items():
            ids = np.arange(prompt)[None] % getattr(session, "vocabulary", 1000)  # their values do not change the time
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
