"""Tasks of lm-evaluation-harness (the package lm-eval) on a model or an exported ONNX folder: accuracy end to end.

    check_tasks(names, folder)                    before a model is loaded
    result = evaluate_tasks(model, tokenizer, names)
    print_table(table(result)); result.write(path)

Prompts, data and metrics are those of the task; likelihoods of a PyTorch model are computed by the harness's own HFLM.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qcompile.generation.onnx_session import Session
from qcompile.memory.atomic_file import write_whole
from qcompile.memory.environment import versions

NEEDS = "tasks need the package lm-eval. Fix: pip install lm-eval"
_RESAMPLES = 1000  # of a bootstrap, for metrics whose standard error has no formula
_ONE_PROCESS = "DISABLE_MULTIPROC"  # what lm-eval reads: a bootstrap of 1000 takes less than starting processes


class TaskError(ValueError):
    """A task that cannot be run; the text names it and the fix."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: the metric.
        filter: what lm-eval did to answers before; "none" for nothing.
        value: the metric's value.
        error: its standard error; None if it has none.
        samples: how many were evaluated.
        higher_is_better: whether a larger value is better; None if the task does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    samples: int
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What one run found.

    Attributes:
        scores: of all tasks.
        tasks: version and few-shot examples of each task, by name.
        limit: samples of each task that were taken; None for all.
        max_length: tokens of the longest text that the model read at once.
    """

    scores: tuple[TaskScore, ...]
    tasks: dict[str, dict[str, Any]]
    limit: int | None
    max_length: int

    def write(self, path: Path, **about: object) -> None:
        """Write it as JSON.

        Args:
            path: the file.
            about: what was measured, as model and recipe.
        """
        data = {**about, **asdict(self), "versions": {**versions(), "lm-eval": _version()}}
        write_whole(path, json.dumps(data, indent=1) + "\n")


def check_tasks(names: Sequence[str], include_path: Path | None = None) -> None:
    """Refuse unknown tasks, before a model is loaded.

    Args:
        names: of tasks, groups or tags; `*` stands for any letters.
        include_path: a folder with YAML files of further tasks.

    Raises:
        TaskError: lm-eval is missing, or a name is none of a task.
    """
    _manager(names, include_path)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    max_length: int = 2048,
    batch: int = 8,
) -> TaskResult:
    """Run tasks.

    Args:
        model: a causal LM of transformers, quantized or not, or a Session.
        tokenizer: its tokenizer.
        names: as of `check_tasks`.
        include_path: as of `check_tasks`.
        limit: take so many samples of each task, the first ones; None for all.
        max_length: tokens that the model reads at once.
        batch: texts that a PyTorch model reads together.

    Raises:
        TaskError: lm-eval is missing, a name is none of a task, or the data of a task cannot be read.
    """
    manager, chosen = _manager(names, include_path)
    from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]

    with _quiet():
        judged = _language_model(model, tokenizer, max_length, batch)
        try:
            found = simple_evaluate(
                model=judged, tasks=chosen, task_manager=manager, limit=limit, bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )  # fmt: skip
        except (OSError, ConnectionError, ImportError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise TaskError(
                f"{', '.join(chosen)} cannot be run ({type(error).__name__}: {reason:.300}). Fix: data of a task come "
                "from a hub unless its YAML file names files; be online, or give such tasks with --include-path"
            ) from error
    return TaskResult(tuple(_scores(found)), _about(found), limit, max_length)


def table(result: TaskResult) -> Table:
    """The scores, one a row."""
    shown = Table()
    for name in ("task", "metric", "value", "+-", "samples", "better"):
        shown.add_column(name, justify="left" if name in ("task", "metric", "better") else "right")
    for score in result.scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        better = {True: "higher", False: "lower", None: ""}[score.higher_is_better]
        error = "" if score.error is None else f"{score.error:.4f}"
        cells = (score.task, metric, f"{score.value:.4f}", error, str(score.samples), better)
        shown.add_row(*(Text(cell) for cell in cells))
    return shown


def _language_model(model: Any, tokenizer: Any, max_length: int, batch: int) -> Any:
    if isinstance(model, Session):
        from qcompile.evaluation.onnx_lm import OnnxLM

        return OnnxLM(model, tokenizer, max_length)
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,unused-ignore]

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length)


def _manager(names: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """The index of tasks, and the names that patterns stand for."""
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise TaskError(f"{NEEDS} ({error.name} is missing)") from error
    manager, missing = None, list(names)
    if include_path is not None:  # alone first: the index of all tasks takes seconds
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        missing = _unknown(names, manager)
    if manager is None or missing:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        missing = _unknown(names, manager)
    if missing:
        raise TaskError(
            f"there is no task {missing[0]!r}. Fix: one of `lm-eval ls tasks`, or name the folder of its YAML file by "
            "--include-path"
        )
    return manager, [name for pattern in names for name in fnmatch.filter(manager.all_tasks, pattern)]


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    return [name for name in names if not fnmatch.filter(manager.all_tasks, name)]


def _scores(found: dict[str, Any]) -> Iterator[TaskScore]:
    for task, values in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            better = found.get("higher_is_better", {}).get(task, {}).get(metric)
            error = float(error) if isinstance(error, int | float) else None
            yield TaskScore(task, metric, filter_name, float(value), error, int(samples), better)


def _about(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        task: {"version": found.get("versions", {}).get(task), "shots": found.get("n-shot", {}).get(task)}
        for task in found["results"]
    }


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither the log of lm-eval nor processes of its own."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get(_ONE_PROCESS)
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ[_ONE_PROCESS] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[_ONE_PROCESS]
        else:
            os.environ[_ONE_PROCESS] = before
