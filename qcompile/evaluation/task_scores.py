"""Tasks of lm-eval in comparisons: one score of each task for every recipe, and how much of the float model's is lost.

Of a task its first metric that has a direction counts, in the order of its file: what its authors name first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.evaluation.lm_eval_tasks import TaskError, TaskResult, TaskScore, evaluate_tasks
from qcompile.memory.digest import digest


@dataclass(frozen=True)
class TaskRun:
    """Tasks that every model of a comparison runs.

    Attributes:
        tokenizer: of the model.
        names: of tasks, groups or tags, as of `check_tasks`.
        include_path: a folder with YAML files of further tasks.
        limit: samples of each task; None for all.
        max_length: tokens that the model reads at once.
    """

    tokenizer: Any
    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    max_length: int = 2048

    def scores(self, model: Any) -> tuple[TaskScore, ...]:
        """The score of each task.

        Args:
            model: a causal LM.

        Raises:
            TaskError: a task cannot be run, or has no metric with a direction.
        """
        found = evaluate_tasks(
            model, self.tokenizer, self.names, include_path=self.include_path, limit=self.limit,
            max_length=self.max_length,
        )  # fmt: skip
        return first_scores(found)

    @property
    def identity(self) -> dict[str, Any]:
        """What scores are of, beside the model: names, samples, and the content of files of tasks."""
        files = sorted(self.include_path.rglob("*.yaml")) if self.include_path is not None else []
        content = {path.name: path.read_text(encoding="utf-8") for path in files}
        return {
            "names": list(self.names),
            "limit": self.limit,
            "max_length": self.max_length,
            "files": digest(content) if content else "",
        }


def first_scores(result: TaskResult) -> tuple[TaskScore, ...]:
    """The first score with a direction of each task. Raises TaskError where a task has none."""
    found: dict[str, TaskScore] = {}
    for score in result.scores:
        if score.higher_is_better is not None:
            found.setdefault(score.task, score)
    missing = [task for task in result.tasks if task not in found and any(s.task == task for s in result.scores)]
    if missing or not found:
        name = missing[0] if missing else ", ".join(result.tasks)
        raise TaskError(f"task {name} has no metric that says what is better. Fix: name other tasks")
    return tuple(found.values())


def task_loss(scores: Sequence[TaskScore], base: Sequence[TaskScore]) -> float:
    """The share of the float model's scores that is lost, as the mean over tasks; below 0 where more is gained.

    Args:
        scores: of a quantized model.
        base: of the float model, the same tasks.

    Raises:
        TaskError: a score of zero, of which there are no shares.
    """
    losses = []
    for score, known in zip(scores, base, strict=True):
        if not known.value:
            raise TaskError(f"the float model's {known.metric} in {known.task} is 0. Fix: name tasks that it can do")
        share = score.value / known.value
        losses.append(1 - share if known.higher_is_better else share - 1)
    return sum(losses) / len(losses)
