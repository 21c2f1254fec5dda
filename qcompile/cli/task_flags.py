"""Tasks of lm-eval on the command line: their flags, what does not fit, and running them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompile.cli.arguments import not_empty, split_names
from qcompile.cli.output import print_table, tell

if TYPE_CHECKING:
    from qcompile.evaluation.task_scores import TaskRun

Tasks = Annotated[str | None, typer.Option(help="tasks of lm-eval, separated by commas", callback=not_empty)]
Limit = Annotated[int | None, typer.Option(help="samples of each task; default: all", min=1)]
IncludePath = Annotated[
    Path | None, typer.Option(help="folder with YAML files of tasks", exists=True, file_okay=False, metavar="DIR")
]


def task_names(tasks: str | None, limit: int | None, include_path: Path | None) -> list[str] | None:
    """The names of tasks, or None, before a model is loaded.

    Raises:
        ValueError: flags of tasks without tasks, or (as TaskError) unknown tasks.
    """
    if tasks is None:
        for flag, value in {"--limit": limit, "--include-path": include_path}.items():
            if value is not None:
                raise ValueError(f"{flag} is of tasks. Fix: give --tasks, or omit {flag}")
        return None
    from qcompile.evaluation.lm_eval_tasks import check_tasks

    names = split_names(tasks)
    check_tasks(names, include_path)
    return names


def check_task_output(names: list[str] | None, text: Path | None, out: Path | None) -> None:
    """Refuse a text beside tasks, and a file of tasks without them or in no folder. Raises ValueError."""
    if names is None and out is not None:
        raise ValueError("--out is of tasks. Fix: give --tasks, or omit --out")
    if names is not None and text is not None:
        raise ValueError("a text and tasks are measured one at a time. Fix: omit --text, or --tasks")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out {out} is no file in a folder that exists. Fix: name a file there")


def task_run(
    names: list[str] | None, tokenizer: Any, include_path: Path | None, limit: int | None, length: int
) -> TaskRun | None:
    """What every model of a comparison runs; None without tasks."""
    from qcompile.evaluation.task_scores import TaskRun

    return None if names is None else TaskRun(tokenizer, tuple(names), include_path, limit, length)


def print_tasks(model: Any, run: TaskRun, out: Path | None, about: dict[str, str | None]) -> None:
    """Run tasks on a model, print every score, and write them.

    Args:
        model: a causal LM or a session.
        run: which tasks.
        out: JSON to write, or None.
        about: what was measured, for the file.
    """
    from qcompile.evaluation.lm_eval_tasks import evaluate_tasks, table

    result = evaluate_tasks(
        model, run.tokenizer, list(run.names), include_path=run.include_path, limit=run.limit,
        max_length=run.max_length, batch=8,
    )  # fmt: skip
    print_table(table(result))
    if out is not None:
        result.write(out, **about)
        tell(f"written: {out}")
