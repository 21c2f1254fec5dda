"""Hooks of MkDocs: pages of the API, made from docstrings, and pages of the source files that documents link to.

Documents link to sources as a checkout has them (`../../qcompile/ir/program.py`), which works where a repository is
browsed. On the site such a link leads to a page with the file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)]*)?\)")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".toml": "toml", ".json": "json", ".sh": "bash"}


def on_files(files: Files, config: Any) -> Files:
    """Add what no file in docs/ holds."""
    import qcompile
    from qcompile import passes

    pages = {
        "reference/python-api.md": _reference("Python API", "qcompile", qcompile.__all__),
        "reference/passes.md": _reference("Passes", "qcompile.passes", passes.__all__),
    }
    open_pages = [(page.src_uri, page.content_string) for page in files.documentation_pages()]
    while open_pages:
        for target in _linked(*open_pages.pop()):
            page = _site_page(target)
            if page not in pages and not target.startswith("docs/"):
                pages[page] = _source(ROOT / target)
                if target.endswith(".md"):
                    open_pages.append((page, pages[page]))
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links between documents and files of the checkout to pages of the site."""
    uri = page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        target = _target(uri, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(_site_page(target), posixpath.dirname(uri) or '.')}{match[3] or ''})"

    return LINK.sub(replaced, markdown)


def _linked(uri: str, markdown: str) -> set[str]:
    """The files that a page links to, from the root of the checkout."""
    found = (_target(uri, match[2]) for match in LINK.finditer(markdown))
    return {target for target in found if target is not None}


def _target(uri: str, link: str) -> str | None:
    """The file that a link of a page leads to, from the root; None for what is no file of the checkout."""
    if ":" in link:
        return None
    file = uri.removeprefix("source/") if uri.startswith("source/") else f"docs/{uri}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(file), link))
    return target if (ROOT / target).exists() else None


def _site_page(target: str) -> str:
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"source/{target}" if target.endswith(".md") else f"source/{target}.md"


def _source(path: Path) -> str:
    """A page with a file, or with the names in a folder."""
    name = path.relative_to(ROOT)
    if path.is_dir():
        return f"# {name}/\n\n" + "\n".join(f"- `{entry.name}`" for entry in sorted(path.iterdir()))
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else f"# {name}\n\n````{LANGUAGES.get(path.suffix, '')}\n{text}\n````\n"


def _reference(title: str, module: str, names: list[str]) -> str:
    """A page with the docstrings of names of a module."""
    return f"# {title}\n\n" + "\n".join(f"::: {module}.{name}\n" for name in names)
