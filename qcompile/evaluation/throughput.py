"""Prefill and decode speed of whole models under torch.compile, candidates interleaved in one run."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from rich.progress import track
from rich.table import Table
from rich.text import Text

from qcompile.api.compile_for_generate import compile_for_generate
from qcompile.backend import dynamo as backend
from qcompile.memory.atomic_file import write_whole
from qcompile.memory.environment import versions
from qcompile.modules.cache_argument import cache_argument, cache_name, returned_cache
from qcompile.pipeline.find_recipe import find_recipe


@dataclass
class ModelSpeed:
    """Times of one model; its rates are medians over the counted rounds.

    Attributes:
        name: the candidate.
        prompt: tokens of the prompt.
        prefill: seconds for the prompt, one entry per round.
        decode: seconds for one token, `new` entries per round.
        first: seconds for the prompt and two tokens in the round that is not counted, in which all graphs compile.
    """

    name: str
    prompt: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    first: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt / statistics.median(self.prefill)

    @property
    def decode_rate(self) -> float:
        """New tokens per second."""
        return 1 / statistics.median(self.decode)


def time_models(
    models: dict[str, Callable[..., Any]],
    ids: torch.Tensor,
    *,
    new: int = 16,
    rounds: int = 5,
    another_round: Callable[[float], bool] = lambda seconds: True,
    another_model: Callable[[str, float], bool] = lambda name, seconds: True,
    progress: bool = True,
) -> dict[str, ModelSpeed]:
    """Prefill a prompt and decode tokens greedily with each model, interleaved.

    Args:
        models: name -> module or compiled module with the `(input_ids, cache)` interface of a causal LM. The
            first call of each compiles and is not counted.
        ids: the prompt, int64 [1, T].
        new: tokens to decode.
        rounds: counted rounds, at most.
        another_round: whether there is time for one more round, given the seconds of the last; the first is counted
            anyway.
        another_model: whether there is time to compile one more model, given its name and the most seconds that one
            took so far, 0 for the first. A model that is skipped is not in the result.
        progress: show a bar.

    Raises:
        ValueError: nothing to time.
    """
    check_counts(ids.shape[1], new, rounds)
    speeds, seconds = {name: ModelSpeed(name, ids.shape[1]) for name in models}, 0.0
    for run in track(range(rounds + 1), "compiling and timing", disable=not progress, transient=True):
        if run > 1 and not another_round(seconds):
            break
        start = time.perf_counter()
        for name in list(speeds):
            if not run and not another_model(name, max(speed.first for speed in speeds.values())):
                del speeds[name]
                continue
            prefill, decode = time_text(models[name], ids, new)
            if run:
                speeds[name].prefill.append(prefill)
                speeds[name].decode += decode
            else:
                speeds[name].first = prefill + sum(decode[:2])
        seconds = time.perf_counter() - start
    return speeds


def check_counts(prompt: int, new: int, rounds: int) -> None:
    """Refuse a measurement of nothing. Raises ValueError."""
    if min(prompt, new, rounds) < 1:
        raise ValueError(f"prompt={prompt}, new={new}, rounds={rounds}: each is 1 or more, or nothing is timed")


def time_text(model: Callable[..., Any], ids: torch.Tensor, new: int) -> tuple[float, list[float]]:
    """Seconds for the prefill of `ids` [1, T], and for each of `new` decoded tokens."""
    named = cache_argument(model) if isinstance(model, torch.nn.Module) else None
    name = named or cache_name()
    with torch.no_grad():
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        for layer in getattr(returned_cache(out), "layers", ()):
            # Inductor's prefill returns transposed views as caches, its decode steps dense ones: without this it would
            # compile decoding twice.
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
        decode = []
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            out = model(input_ids=token, use_cache=True, logits_to_keep=1, **{name: returned_cache(out)})
            decode.append(time.perf_counter() - start)
    return prefill, decode


def allow_recompiles() -> None:
    """Raise Dynamo's limits for a process in which several candidates compile the same Python code."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024


@dataclass
class SpeedComparison:
    """Speeds of several candidates in one run.

    Attributes:
        speeds: by candidate; those of torch.compile's own backend are named "inductor DTYPE".
        weight_bytes: of the weights of all sites, by candidate; embedding tables are not counted.
    """

    speeds: dict[str, ModelSpeed]
    weight_bytes: dict[str, int]

    def table(self) -> Table:
        """One row per candidate; ratios are to the fastest float candidate in that column."""
        peers = [s for name, s in self.speeds.items() if name.startswith("inductor")]
        best_prefill = max(s.prefill_rate for s in peers)
        best_decode = max(s.decode_rate for s in peers)
        table = Table(
            "candidate", "weights MB", "prefill tok/s", "x float", "decode tok/s", "x float", "cold start s"
        )  # fmt: skip
        for name, s in self.speeds.items():
            table.add_row(
                Text(name),
                f"{self.weight_bytes[name] / 1e6:.0f}",
                f"{s.prefill_rate:.0f}",
                f"{s.prefill_rate / best_prefill:.2f}",
                f"{s.decode_rate:.1f}",
                f"{s.decode_rate / best_decode:.2f}",
                f"{s.first:.0f}",
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data with versions."""
        return {
            "versions": versions(),
            "rows": [
                {
                    "candidate": name,
                    "prompt": s.prompt,
                    "weight_bytes": self.weight_bytes[name],
                    "prefill_tokens_per_second": s.prefill_rate,
                    "decode_tokens_per_second": s.decode_rate,
                    "first_seconds": s.first,
                }
                for name, s in self.speeds.items()
            ],
        }

    def write(self, path: str | Path) -> None:
        """Write `to_json()`."""
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")


def compare_with_inductor(
    model: Any,
    recipes: list[str],
    *,
    also: torch.dtype | None = None,
    decode_step: bool = False,
    prompt: int = 512,
    new: int = 16,
    rounds: int = 5,
    progress: bool = True,
) -> SpeedComparison:
    """Time a causal LM under Inductor and under qcompile recipes, in its own dtype.

    Args:
        model: a float causal LM.
        recipes: preset names or JSON files.
        also: a second dtype in which Inductor is timed.
        decode_step: whether to time `compile_for_generate` of each recipe too, named "RECIPE DTYPE, decode step".
        prompt: tokens of the prompt.
        new: tokens to decode after it.
        rounds: counted rounds.
        progress: show a bar.

    Raises:
        ValueError: nothing to time, or an unknown recipe, before any work.
    """
    check_counts(prompt, new, rounds)
    for recipe in recipes:
        find_recipe(recipe, model).check()
    allow_recompiles()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (1, prompt), generator=generator)
    own = str(next(model.parameters()).dtype).removeprefix("torch.")
    candidates = {f"inductor {own}": torch.compile(model, backend="inductor", dynamic=True)}
    if also is not None:
        other = copy.deepcopy(model).to(also)
        candidates[f"inductor {str(also).removeprefix('torch.')}"] = torch.compile(
            other, backend="inductor", dynamic=True
        )
    for recipe in recipes:
        candidates[f"qcompile {recipe} {own}"] = torch.compile(
            model, backend="qcompile", dynamic=True, options={"recipe": recipe}
        )
        if decode_step:
            stepping = copy.deepcopy(model)
            compile_for_generate(stepping, recipe)
            candidates[f"qcompile {recipe} {own}, decode step"] = stepping
    backend.reports.clear()
    speeds = time_models(candidates, ids, new=new, rounds=rounds, progress=progress)
    size: dict[str, int] = {}
    for name in candidates:
        found = [r for r in backend.reports if name.startswith(f"qcompile {r.recipe} ")]
        width = 2 if "bfloat16" in name else 4
        if found:  # a prefill may keep sites float that decoding reads quantized
            size[name] = min(report.bytes_after for report in found)
        else:
            some = next(iter(backend.reports)) if backend.reports else None
            size[name] = sum(s.N * s.K * width for s in some.sites) if some else 0
    return SpeedComparison(speeds, size)
