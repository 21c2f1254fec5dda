"""A report as one HTML file: sites with reasons and bytes, passes, certificates, comparisons, damage, plots.

The file holds its styles, scripts and plots, so that it opens anywhere and can be sent by mail.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from qcompile.evaluation import output_errors, plots
from qcompile.evaluation.compare import RecipeResult
from qcompile.evaluation.sensitivity import Damage
from qcompile.memory.atomic_file import write_whole
from qcompile.memory.environment import versions
from qcompile.recipe.report import Report


@dataclass
class HTMLReport:
    """What one file shows; parts that are empty are omitted.

    Attributes:
        title: the command or the model, for people.
        report: of quantizing.
        rows: of a comparison or a search, the float model first.
        damages: of single sites.
        drawings: caption -> what draws a plot into a file, as the functions named `plot` of this package do.
    """

    title: str
    report: Report | None = None
    rows: Sequence[RecipeResult] = ()
    damages: Sequence[Damage] = ()
    drawings: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def __str__(self) -> str:
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"bytes": _bytes, "number": _number}
        return environment.get_template("report.html.jinja").render(
            title=self.title,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            versions=versions(),
            report=self.report,
            rows=self.rows,
            damages=_by_site(self.damages),
            formats=list(dict.fromkeys(str(d.formats) for d in self.damages)),
            largest=max((d.kl for d in self.damages), default=0.0),
            figures=self._figures(),
            no_plots=None if plots.is_available() or not self._drawings else plots.NEEDS,
        )

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        write_whole(path, str(self))

    @property
    def _drawings(self) -> dict[str, Callable[[Path], None]]:
        """Those that were given, and the output errors where a pass measured some."""
        if self.report is None or not any(site.output_error for site in self.report.sites):
            return self.drawings
        return {**self.drawings, output_errors.CAPTION: functools.partial(output_errors.plot, self.report)}

    def _figures(self) -> list[tuple[str, str]]:
        """Captions, and plots as SVG elements."""
        if not plots.is_available():
            return []
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for index, (caption, draw) in enumerate(self._drawings.items()):
                path = Path(folder) / f"{index}.svg"
                draw(path)
                found.append((caption, _element(path.read_text(encoding="utf-8"), index)))
        return found


def _element(svg: str, index: int) -> str:
    """The svg element of a file. Names within it are those of no other plot on the page, and it fits into the page."""
    start = svg.index("<svg")
    inner = re.sub(r"<metadata>.*?</metadata>", "", svg[start:], flags=re.DOTALL).replace("xlink:href", "href")
    inner = re.sub(r'(\bid="|href="#|url\(#)', rf"\1plot{index}-", inner)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns="http://www.w3.org/2000/svg" \1>', inner, count=1)


def _by_site(damages: Sequence[Damage]) -> list[dict[str, Any]]:
    """One entry for each site in graph order: its name, and formats -> damage."""
    found: dict[str, dict[str, Damage]] = {}
    for damage in damages:
        found.setdefault(damage.site, {})[str(damage.formats)] = damage
    return [{"site": site, "damage": by_formats} for site, by_formats in found.items()]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _number(value: float) -> str:
    return f"{value:.4g}"
