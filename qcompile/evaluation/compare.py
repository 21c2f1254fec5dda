"""Recipes side by side on one model and one text: quality, bytes, time and memory of each; tasks of lm-eval too.

The row of a recipe is written to disk as soon as it is measured, so an interrupted comparison continues where it
stopped. Models, texts and recipes are recognized by digests of their content: names may be used again. The float model
is run beside each candidate, and its logits are not kept: memory does not grow with the text.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from qcompile.api.quantize import quantize
from qcompile.evaluation.lm_eval_tasks import TaskScore
from qcompile.evaluation.perplexity import agreement, check_windows, perplexity
from qcompile.evaluation.plots import label_point, plot_file
from qcompile.evaluation.task_scores import TaskRun
from qcompile.memory.atomic_file import write_whole
from qcompile.memory.digest import digest, model_digest
from qcompile.memory.environment import versions
from qcompile.memory.process import measure_peak
from qcompile.passes import FoldNorm, Rotate, Untie
from qcompile.pipeline.find_recipe import find_recipe
from qcompile.recipe.recipe import Recipe
from qcompile.version import VERSION


@dataclass(frozen=True)
class RecipeResult:
    """One recipe on one model and text.

    Attributes:
        recipe: its name.
        perplexity: over the windows.
        kl: mean KL(float || quantized), nats per token.
        agreement: share of tokens whose most likely successor is the float model's.
        site_bytes: bytes of the weights of all sites, as they are stored.
        seconds: to quantize, calibration included.
        peak_bytes: peak memory of quantizing, above what the process used before; 0 if unknown.
        digest: of the recipe's passes and rules, the calibration data that it needs, and this package's version.
        tasks: a score of each task, where tasks were run.
    """

    recipe: str
    perplexity: float
    kl: float
    agreement: float
    site_bytes: int
    seconds: float
    peak_bytes: int = 0
    digest: str = ""
    tasks: tuple[TaskScore, ...] = ()

    @staticmethod
    def from_json(row: dict[str, Any]) -> RecipeResult:
        """A row of a file; one without tasks is of a comparison without them."""
        return RecipeResult(**{**row, "tasks": tuple(TaskScore(**score) for score in row.get("tasks", ()))})


@dataclass
class Comparison:
    """Rows of recipes on one model and text, measured once and kept in a file.

    Attributes:
        model: a float causal LM; not changed.
        token_windows: int64 [1, T] each.
        calibration: returns the batches for recipes that need data.
        out: a JSON file to write to and to continue from.
        label: what is measured (model, text), for people.
        tasks: of lm-eval, which every model runs too; None for none.

    Raises:
        ValueError: `out` is of another model or text, or no file of a comparison; or a window has no next token.
    """

    model: nn.Module
    token_windows: Sequence[Tensor]
    calibration: Callable[[], Sequence[Any]]
    out: Path | None = None
    label: str = ""
    tasks: TaskRun | None = None

    def __post_init__(self) -> None:
        check_windows(self.token_windows)
        data = read_rows(self.out)
        if data is not None and {k: v for k, v in data["of"].items() if k != "label"} != self._identity:
            raise ValueError(
                f"{self.out} is of another comparison ({data['of'].get('label')}): other weights or another text, "
                "or other tasks. Fix: choose another file, or remove it"
            )
        self.rows = {row["digest"]: RecipeResult.from_json(row) for row in data["rows"]} if data is not None else {}

    def measure(self, name: str) -> RecipeResult:
        """The row of one recipe (a preset name or a JSON path), from the file or by quantizing a copy."""
        recipe = find_recipe(name)
        key = self._digest_of(recipe)
        if key not in self.rows:
            row = replace(self._measure(recipe.name, recipe), digest=key)
            self.rows = {old: r for old, r in self.rows.items() if r.recipe != recipe.name} | {key: row}
            self._write()
        return replace(self.rows[key], recipe=recipe.name)

    def _measure(self, name: str, recipe: Recipe) -> RecipeResult:
        if not recipe.passes:
            own = perplexity(self.model, self.token_windows, progress=False)
            return RecipeResult(name, own, 0.0, 1.0, 0, 0.0, tasks=self._scores(self.model))
        batches = self.batches if recipe.needs else None
        start = time.perf_counter()
        with measure_peak() as peak:
            candidate = copy.deepcopy(self.model)
            report = quantize(candidate, recipe, batches, progress=False)
        seconds = time.perf_counter() - start
        found = agreement(candidate, self.model, self.token_windows)
        return RecipeResult(
            name, found.perplexity, found.kl, found.top1, report.bytes_after, seconds, peak.bytes,
            tasks=self._scores(candidate),
        )  # fmt: skip

    def _scores(self, model: nn.Module) -> tuple[TaskScore, ...]:
        return () if self.tasks is None else self.tasks.scores(model)

    @functools.cached_property
    def batches(self) -> list[Any]:
        """The calibration data, read once."""
        return list(self.calibration())

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What rows are of: the content of the model and of the text."""
        return {
            "model": model_digest(self.model),
            "text": digest(list(self.token_windows)),
            "windows": len(self.token_windows),
            "length": int(self.token_windows[0].shape[1]),
            **({} if self.tasks is None else {"tasks": self.tasks.identity}),
        }

    def _digest_of(self, recipe: Recipe) -> str:
        plain = recipe.to_json()
        return digest([plain["passes"], plain["rules"], VERSION, self.batches if recipe.needs else None])

    def _write(self) -> None:
        if self.out is None:
            return
        of = {"label": self.label, **self._identity}
        data = {"versions": versions(), "of": of, "rows": [asdict(r) for r in self.rows.values()]}
        write_whole(self.out, json.dumps(data, indent=1) + "\n")


def read_rows(out: Path | None) -> dict[str, Any] | None:
    """The file of a comparison as plain data; None where there is none yet.

    Raises:
        ValueError: something else is there.
    """
    if out is None or not out.exists():
        return None
    if not out.is_file():
        raise ValueError(f"{out} is no regular file, and rows are read from it too. Fix: name a .json file")
    try:
        data: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        whole = isinstance(data["of"], dict) and all(map(_is_row, data["rows"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(
            f"{out} is no file of a comparison, or of an earlier version. Fix: choose another file, or remove it"
        )
    return data


def _is_row(row: dict[str, Any]) -> bool:
    named = {f.name: str if f.type == "str" else int | float for f in fields(RecipeResult) if f.name != "tasks"}
    scores = row.get("tasks", [])
    names = {f.name for f in fields(TaskScore)}
    if not isinstance(scores, list) or not all(isinstance(score, dict) and score.keys() == names for score in scores):
        return False
    return row.keys() - {"tasks"} == named.keys() and all(isinstance(row[n], kind) for n, kind in named.items())


def compare(comparison: Comparison, recipes: Sequence[str], *, progress: bool = True) -> list[RecipeResult]:
    """Measure the float model, then recipes (preset names or JSON paths).

    Raises:
        RecipeError: an unknown or impossible recipe, before any work.
    """
    names = ["float", *[r for r in recipes if r != "float"]]
    for name in names:
        find_recipe(name).check()
    return [comparison.measure(n) for n in track(names, "comparing", disable=not progress, transient=True)]


def table(rows: Sequence[RecipeResult]) -> Table:
    """One row per recipe."""
    tasks = [f"{score.task} {score.metric}" for score in (rows[0].tasks if rows else ())]
    found = Table("recipe", "perplexity", "KL to float", "same top-1", *tasks, "weights MB", "quantize s", "peak MB")
    for r in rows:
        scores = [f"{score.value:.4f}" for score in r.tasks]
        cost = (f"{r.site_bytes / 1e6:.0f}", f"{r.seconds:.1f}", f"{r.peak_bytes / 1e6:.0f}") if r.site_bytes else ()
        found.add_row(Text(r.recipe), f"{r.perplexity:.2f}", f"{r.kl:.4f}", f"{r.agreement:.1%}", *scores, *cost)
    return found


def plot(rows: Sequence[RecipeResult], path: Path) -> None:
    """Draw perplexity against megabytes of quantized weights.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with plot_file(path) as axes:
        for r in filter(lambda row: math.isfinite(row.perplexity), rows):
            if r.site_bytes:
                axes.scatter(r.site_bytes / 1e6, r.perplexity, s=40, color="C0")
                label_point(axes, r.recipe, r.site_bytes / 1e6, r.perplexity)
            else:
                axes.axhline(r.perplexity, color="0.5", linestyle="--", linewidth=1)
                axes.annotate("float", (1, r.perplexity), (-4, 3), xycoords=("axes fraction", "data"),
                              textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("quantized weights, MB (less is better)")
        axes.set_ylabel("perplexity (less is better)")
        axes.grid(alpha=0.3, which="both")
        axes.margins(x=0.15)


def rotated_copy(model: nn.Module) -> nn.Module:
    """A copy that computes the same function in randomly rotated bases.

    Weights that come from a quantized file lie on that file's grid, where rounding is nearly free; those of the copy
    do not, so it is what weight formats should be judged on.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        quantize(copied, Recipe("rotated copy", (Untie(), FoldNorm(), Rotate())), progress=False)
    return copied
