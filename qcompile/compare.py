"""Recipes side by side on one model and one text: what each costs and what it keeps.

Each recipe's row is written to disk as soon as it is measured, so an interrupted comparison goes on
where it stopped. The float model is run beside each candidate and not remembered: memory does not
grow with the text.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from qcompile.bench import versions
from qcompile.evaluate import agreement, perplexity
from qcompile.presets import find_recipe
from qcompile.quantize import quantize
from qcompile.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One recipe on one model and text.

    Attributes:
        perplexity: over the windows. kl: mean KL(float || quantized), nats for each token.
        agreement: share of tokens whose most likely successor is the float model's.
        site_bytes: bytes of all site weights. seconds: to quantize, calibration included.
    """

    recipe: str
    perplexity: float
    kl: float
    agreement: float
    site_bytes: int
    seconds: float


def compare(
    model: nn.Module,
    recipes: Sequence[str],
    token_windows: Sequence[Tensor],
    calibration: Callable[[], Sequence[Any]],
    *,
    out: Path | None = None,
    label: str = "",
    progress: bool = True,
) -> list[Row]:
    """Measure a float model and recipes.

    Args:
        model: float, of transformers; left as it is. recipes: preset names or JSON paths; "float"
            is measured first in any case.
        token_windows: int64 [1, T] each. calibration: gives the batches for recipes that need data.
        out: a JSON file to write to and to continue from. label: what was measured (model, text);
            an `out` with another label is refused.
        progress: show a bar.

    Raises:
        RecipeError: an unknown recipe, before any work. ValueError: `out` is of another comparison.
    """
    names = ["float", *[r for r in recipes if r != "float"]]
    found = [find_recipe(name) for name in names]
    for recipe in found:
        recipe.check()
    known = _known(out, label, token_windows)
    rows: list[Row] = []
    for name, recipe in track(list(zip(names, found, strict=True)), "comparing", disable=not progress, transient=True):
        if name not in known:
            known[name] = _measure(name, recipe, model, token_windows, calibration)
            _write(out, label, token_windows, known)
        rows.append(known[name])
    return rows


def _measure(
    name: str,
    recipe: Recipe,
    model: nn.Module,
    token_windows: Sequence[Tensor],
    calibration: Callable[[], Sequence[Any]],
) -> Row:
    if not recipe.passes:
        return Row(name, perplexity(model, token_windows, progress=False), 0.0, 1.0, 0, 0.0)
    candidate, start = copy.deepcopy(model), time.perf_counter()
    report = quantize(candidate, recipe, calibration() if recipe.needs else None, progress=False)
    seconds = time.perf_counter() - start
    found = agreement(candidate, model, token_windows)
    return Row(name, found.perplexity, found.kl, found.top1, report.bytes_after, seconds)


def _key(label: str, token_windows: Sequence[Tensor]) -> dict[str, Any]:
    return {"label": label, "windows": len(token_windows), "length": int(token_windows[0].shape[1])}


def _known(out: Path | None, label: str, token_windows: Sequence[Tensor]) -> dict[str, Row]:
    if out is None or not out.is_file():
        return {}
    data = json.loads(out.read_text())
    if data.get("of") != _key(label, token_windows):
        raise ValueError(f"{out} holds another comparison ({data.get('of')}): choose another file or remove it")
    return {row["recipe"]: Row(**row) for row in data["rows"]}


def _write(out: Path | None, label: str, token_windows: Sequence[Tensor], known: dict[str, Row]) -> None:
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    data = {"versions": versions(), "of": _key(label, token_windows), "rows": [asdict(r) for r in known.values()]}
    work = out.with_suffix(".partial")
    work.write_text(json.dumps(data, indent=1) + "\n")
    work.replace(out)


def table(rows: Sequence[Row]) -> Table:
    """A rich table."""
    found = Table("recipe", "perplexity", "KL to float", "same top-1", "site weights MB", "quantize s")
    for r in rows:
        cost = (f"{r.site_bytes / 1e6:.0f}", f"{r.seconds:.1f}") if r.site_bytes else ("", "")
        found.add_row(r.recipe, f"{r.perplexity:.2f}", f"{r.kl:.4f}", f"{r.agreement:.1%}", *cost)
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against megabytes of site weights. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for r in rows:
        if r.site_bytes:
            axis.scatter(r.site_bytes / 1e6, r.perplexity, s=40, color="C0")
            axis.annotate(r.recipe, (r.site_bytes / 1e6, r.perplexity), (5, 4), textcoords="offset points", fontsize=8)
        else:
            axis.axhline(r.perplexity, color="0.5", linestyle="--", linewidth=1)
            axis.annotate("float", (1, r.perplexity), (-4, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("site weights, MB (less is better)")
    axis.set_ylabel("perplexity (less is better)")
    axis.grid(alpha=0.3, which="both")
    axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def rotated_twin(model: nn.Module) -> nn.Module:
    """A copy that computes the same in randomly rotated bases.

    Weights that come from a quantized file lie on that file's grid, where rounding is nearly free;
    the twin's do not, so it is what weight formats should be judged on.
    """
    from qcompile.passes import FoldNorm, Rotate, Untie

    twin = copy.deepcopy(model)
    with torch.no_grad():
        quantize(twin, Recipe("twin", (Untie(), FoldNorm(), Rotate())), progress=False)
    return twin
