"""Reports as HTML: well-formed, self-contained, with every site, reason, certificate and plot; names are escaped."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import qcompile
from qcompile import Format
from qcompile.evaluation import plots
from qcompile.evaluation.compare import RecipeResult
from qcompile.evaluation.compare import plot as plot_comparison
from qcompile.evaluation.html_report import HTMLReport
from qcompile.evaluation.output_errors import CAPTION
from qcompile.evaluation.sensitivity import Damage, SiteFormats
from qcompile.evaluation.sensitivity import plot as plot_damages
from qcompile.recipe.report import Certificate, PassReport, Report, SiteReport, Skipped

VOID = {"meta", "input", "br", "path", "use"}
NAME = "block.<b>0</b>.weight"
REPORT = Report(
    "mine",
    sites=[
        SiteReport(NAME, 32, 64, "int4/group32", "int8/row", {"decode": "w4a8"}, "", 4096, 1280, (0.02, 0.0125)),
        SiteReport("logits.weight", 90, 64, "float", "float", {}, "kept float by the rule 'logits.*'", 11520, 11520),
    ],
    passes=[PassReport("Rotate", ["stream 0"], [Skipped("a & b", "its norm is open", "add_3")], ["hadamard 64"])],
    certificates=[Certificate("Rotate", 1e-7, 1e-4, "float32"), Certificate("FoldNorm", 0.1, 1e-4, "float32", "mul_2")],
    breaks=["line 3: print"],
    seconds=1.25,
    peak_bytes=5_000_000,
    metrics={"top-1 agreement": 0.96875},
)  # fmt: skip
ROWS = [
    RecipeResult("float", 20.0, 0.0, 1.0, 0, 0.0),
    RecipeResult("int8", 20.125, 0.0123, 0.98, 2_500_000, 1.5, 7_000_000),
    RecipeResult("w4a16", 22.5, 0.0987, 0.9, 1_300_000, 0.5),
]
FORMATS = SiteFormats(Format.parse("int4/group32")), SiteFormats(Format.parse("int8"), Format.parse("int8/row"))
DAMAGES = [Damage(f"{i}.weight", formats, 100, 0.001 * (i + 1)) for i in range(3) for formats in FORMATS]


class Page(HTMLParser):
    """What a file says: text by element, tables by id, and whether elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tables, self.attributes = [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag == "table":
            self.tables[dict(attrs)["id"]] = self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if set(self.open) & {"td", "th"}:
            self.rows[-1][-1] += data


def whole():
    drawings = {
        "trade-off": functools.partial(plot_comparison, ROWS),
        "damage": functools.partial(plot_damages, DAMAGES),
    }
    return HTMLReport("qcompile quantize <model>", REPORT, ROWS, DAMAGES, drawings)


def test_everything_is_in_the_file():
    page = Page(str(whole()))
    sites, certificates, recipes, damage = (
        page.tables[name] for name in ("sites", "certificates", "recipes", "damage")
    )
    assert sites[1:] == [
        [NAME, "32", "64", "int4/group32", "int8/row", "decode: w4a8", "4.1 kB", "1.3 kB", "1.25e-02", ""],
        [
            "logits.weight",
            "90",
            "64",
            "float",
            "float",
            "",
            "11.5 kB",
            "11.5 kB",
            "",
            "kept float by the rule 'logits.*'",
        ],
    ]
    assert [row[1] for row in certificates[1:]] == ["holds", "broken, undone"] and certificates[2][-1] == "mul_2"
    assert [row[:5] for row in recipes[1:]] == [
        ["float", "20.000", "0.0000", "100.0%", ""],
        ["int8", "20.125", "0.0123", "98.0%", "2.5 MB"],
        ["w4a16", "22.500", "0.0987", "90.0%", "1.3 MB"],
    ]
    assert damage[0] == ["site", str(FORMATS[0]), "class", str(FORMATS[1]), "class"]
    assert damage[3] == ["2.weight", "0.00300", "1", "0.00300", "1"]
    text = "".join(page.texts)
    for part in ("15.6 kB → 12.8 kB", "1 of 2", "0.9688", "its norm is open", "a & b", "hadamard 64", "line 3: print"):
        assert part in text, part


def test_every_row_has_the_cells_of_its_header():
    for rows in Page(str(whole())).tables.values():
        assert {len(row) for row in rows} == {len(rows[0])}


def test_a_bar_is_a_share_of_the_largest():
    widths = [
        float(w) for w in re.findall(r'class="bar" style="width:([\d.]+)%"', str(HTMLReport("t", damages=DAMAGES)))
    ]
    assert widths == [33.3, 33.3, 66.7, 66.7, 100.0, 100.0]


def test_names_are_text_and_nothing_is_loaded_from_elsewhere():
    text = str(whole())
    assert "<b>0</b>" not in text and "<model>" not in text
    outside = [
        value for name, value in Page(text).attributes if name in ("src", "href", "xlink:href") and value[0] != "#"
    ]
    assert not outside and "@import" not in text


def test_parts_that_are_empty_are_omitted():
    page = Page(str(HTMLReport("empty", Report("float"))))
    assert not page.tables and "Certificates" not in "".join(page.texts)


def test_plots_are_in_the_file_and_share_no_names():
    text = str(whole())
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == 3 and CAPTION in text, "those that were given, and the output errors of the report"
    names = []
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        own = {value for element in tree.iter() for key, value in element.attrib.items() if key == "id"}
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', figure))
        assert used and used <= own
        names += own
    assert len(names) == len(set(names))


def test_without_matplotlib_the_file_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(plots, "is_available", lambda: False)
    assert "torch-qcompile[plot]" in "".join(Page(str(whole())).texts)


def test_a_real_run_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    report = qcompile.quantize(model, "int8", example=torch.randn(2, 64), progress=False)
    path = tmp_path / "new" / "report.html"
    HTMLReport("a net", report).write(path)
    assert {row[0] for row in Page(path.read_text()).tables["sites"][1:]} == {site.name for site in report.sites}
    before = path.read_text()
    monkeypatch.setattr(HTMLReport, "_figures", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HTMLReport("another").write(path)
    assert path.read_text() == before


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
CLICK = """<script>
const sorted = () => [...document.querySelectorAll("#recipes tbody tr")].map(row => row.cells[0].textContent)
document.querySelectorAll("#recipes th")[4].click(); document.title = sorted().join()
const field = document.querySelector("input[data-filter=sites]")
field.value = "KEPT"; field.dispatchEvent(new Event("input"))
document.title += " " + [...document.querySelectorAll("#sites tbody tr")].map(row => row.hidden).join()
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_tables_are_sorted_and_filtered_in_a_browser(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(str(whole()).replace("</body>", CLICK + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>float,w4a16,int8 true,false</title>" in done.stdout, done.stderr
