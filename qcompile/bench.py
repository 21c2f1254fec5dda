"""Timing whole models: prefill and decode of a causal LM, candidates interleaved in one run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from rich.progress import track


def versions() -> dict[str, str]:
    """What a number was measured with."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for name in ("torch", "transformers", "onnxruntime", "torch-qcompile"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["cpu"] = _cpu()
    found["isa"] = torch.backends.cpu.get_cpu_capability()
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass
class Speed:
    """Medians over interleaved rounds, in seconds; tokens per second as properties."""

    name: str
    prompt: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)  # seconds for one token

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt / statistics.median(self.prefill)

    @property
    def decode_rate(self) -> float:
        """New tokens per second."""
        return 1 / statistics.median(self.decode)


def time_models(
    models: dict[str, Callable[..., Any]], ids: torch.Tensor, *, new: int = 16, rounds: int = 5, progress: bool = True
) -> dict[str, Speed]:
    """Prefill `ids` [1, T] and decode `new` tokens greedily with each model, in turn.

    Args:
        models: name -> module or compiled module with the `(input_ids, past_key_values)` interface
            of a causal LM. The first call of each compiles and is not counted.
        ids: the prompt. new: tokens. rounds: counted rounds. progress: show a bar.
    """
    speeds = {name: Speed(name, ids.shape[1]) for name in models}
    for run in track(range(rounds + 2), "timing", disable=not progress, transient=True):
        for name, model in models.items():
            prefill, decode = _once(model, ids, new)
            if run >= 2:  # two rounds compile static and dynamic shapes
                speeds[name].prefill.append(prefill)
                speeds[name].decode += decode
    return speeds


def _once(model: Callable[..., Any], ids: torch.Tensor, new: int) -> tuple[float, list[float]]:
    with torch.no_grad():
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        decode = []
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            decode.append(time.perf_counter() - start)
    return prefill, decode
