"""The documents as a site: every link and anchor leads somewhere, sources and the API have pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT

import qcompile
from qcompile import passes


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr  # a link or an anchor that leads nowhere is a warning
    return folder


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.found |= {value for name, value in attrs if name in ("href", "src") and value}


@pytest.mark.slow
def test_every_page_is_there_and_links_lead_to_pages(site):
    for page in PAGES:
        name = page.relative_to(ROOT / "docs") if page.is_relative_to(ROOT / "docs") else Path("source") / page.name
        place = site / name.with_suffix("") / "index.html" if name.stem not in ("index", "README") else None
        assert place is None or place.is_file(), name
    for page in site.rglob("index.html"):
        for link in Links(page).found:
            target = link.partition("#")[0].partition("?")[0]
            if target and not re.match(r"\w+:", target):
                assert (page.parent / target).exists(), f"{page.relative_to(site)}: {link}"


@pytest.mark.slow
def test_every_public_name_has_its_docstring(site):
    for page, names in (("python-api", qcompile.__all__), ("passes", passes.__all__)):
        text = (site / "reference" / page / "index.html").read_text()
        missing = [name for name in names if not re.search(rf'id="qcompile[\w.]*\.{name}"', text)]
        assert not missing


@pytest.mark.slow
def test_links_to_sources_lead_to_pages_with_the_file(site):
    page = site / "design" / "architecture" / "index.html"
    sources = {link for link in Links(page).found if "/source/" in link}
    assert any("qcompile/" in link for link in sources)
    assert all((page.parent / link / "index.html").is_file() for link in sources)
