"""The cheapest recipe that keeps a model good enough.

Source: "Efficient LLM Inference on CPUs", arXiv:2311.00502 sec. 2.1: recipes are tried in an order
        until one meets the accuracy goal. Here the order is by bytes of weights, then by the time
        that quantizing takes, and the goal is a share of the float model's perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.evaluation.compare import Comparison, RecipeResult
from qcompile.evaluation.plots import label_point, plot_file
from qcompile.evaluation.task_scores import task_loss
from qcompile.pipeline.find_recipe import find_recipe

# By bytes, then by work: 4 bits rounded to nearest, 4 bits by slower algorithms, then 8 bits.
LADDER = (
    "w4a8", "w4a16", "w4a16-hqq", "w4a16-awq", "w4a16-gptq", "w4a16-rotated-gptq",
    "int8", "int8-rotated", "int8-gptq", "w8a16",
)  # fmt: skip
_SLACK = 1e-9  # of float sums, so that a loss that equals the goal is within it


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        chosen: the first recipe within the goal, or None.
        nearest: the best of those tried.
        rows: what was tried, the float model first.
    """

    chosen: RecipeResult | None
    nearest: RecipeResult
    rows: list[RecipeResult]


def tune(
    comparison: Comparison,
    *,
    max_loss: float = 0.01,
    recipes: Sequence[str] = LADDER,
    tell: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Try recipes in order until one's perplexity is within `max_loss` of the float model's.

    Where the comparison has tasks, their scores count in place of the perplexity: the share of the float model's that
    is lost, as the mean over tasks.

    Args:
        comparison: the model and the text; its file lets an interrupted search continue.
        max_loss: relative, 0.01 for one percent.
        recipes: in the order to try.
        tell: receives one line per recipe as it is measured.

    Raises:
        ValueError: an impossible goal or an unknown recipe, before any work; or a float model without a perplexity, or
            with a score of zero.
    """
    check_goal(max_loss, recipes)
    rows = [comparison.measure("float")]
    if not math.isfinite(rows[0].perplexity):
        raise ValueError(f"the float model's perplexity is {rows[0].perplexity}. Fix: check the model and the text")
    if rows[0].tasks:
        recipe_loss(rows[0], rows[0])  # a score of zero is refused before recipes are tried
        scores = ", ".join(f"{score.task} {score.metric} {score.value:.4f}" for score in rows[0].tasks)
        tell(f"float: {scores}, goal a loss of {max_loss:.2%} in the mean")
    else:
        goal = rows[0].perplexity * (1 + max_loss)
        tell(f"float: perplexity {rows[0].perplexity:.3f}, goal {goal:.3f}")
    for name in recipes:
        row = comparison.measure(name)
        rows.append(row)
        worse = recipe_loss(row, rows[0])
        shown = "tasks" if row.tasks else f"{row.perplexity:.3f}"
        tell(f"{name}: {shown} ({worse:+.2%}), {row.site_bytes / 1e6:.0f} MB, {row.seconds:.0f} s")
        if worse <= max_loss * (1 + _SLACK):
            return Tuned(row, row, rows)

    def order(row: RecipeResult) -> float:
        loss = recipe_loss(row, rows[0])
        return math.inf if math.isnan(loss) else loss

    return Tuned(None, min(rows[1:], key=order), rows)


def recipe_loss(row: RecipeResult, base: RecipeResult) -> float:
    """How much a recipe loses, as a share: of the scores of tasks, where there are any, or of the perplexity.

    Args:
        row: of the recipe.
        base: of the float model.
    """
    return task_loss(row.tasks, base.tasks) if base.tasks else row.perplexity / base.perplexity - 1


def check_goal(max_loss: float, recipes: Sequence[str]) -> None:
    """Refuse an impossible goal and unknown or impossible recipes. Raises ValueError."""
    if not 0 < max_loss < 10:
        raise ValueError(
            f"max_loss is a share of the float perplexity (0.01 is 1%), above 0 and below 10; got {max_loss}"
        )
    if not recipes:
        raise ValueError("no recipe to try. Fix: give at least one name")
    for name in recipes:
        find_recipe(name).check()


def plot_frontier(rows: Sequence[RecipeResult], max_loss: float, path: Path) -> None:
    """Draw the loss of perplexity, or of the scores of tasks, against megabytes, with the goal and the Pareto frontier.

    Args:
        rows: as in `Tuned`.
        max_loss: the goal, relative.
        path: the file to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    tried = [(row, recipe_loss(row, rows[0])) for row in rows[1:]]
    points = [(row.site_bytes / 1e6, max(loss, 1e-4), row.recipe) for row, loss in tried if math.isfinite(loss)]
    best = [p for p in points if not any(o[0] <= p[0] and o[1] < p[1] for o in points)]
    with plot_file(path) as axes:
        axes.plot([p[0] for p in sorted(best)], [p[1] for p in sorted(best)], color="C0", linewidth=1, label="frontier")
        for x, y, name in points:
            axes.scatter(x, y, s=40, color="C2" if y <= max_loss else "C3")
            label_point(axes, name, x, y)
        axes.axhline(max_loss, color="0.5", linestyle="--", linewidth=1, label=f"goal {max_loss:.1%}")
        axes.set(yscale="log", xlabel="quantized weights, MB (less is better)")
        axes.set(ylabel=f"loss of {'task scores' if rows[0].tasks else 'perplexity'} (less is better)")
        axes.grid(alpha=0.3, which="both")
        axes.margins(x=0.15)
        axes.legend(fontsize=8)
