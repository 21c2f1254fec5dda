"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from retired_words import IDENTIFIERS, faults

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("qcompile", "passes", "codegen")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not str(path.relative_to(ROOT)).startswith(("qcompile/passes", "qcompile/codegen"))  # links to the folders above
]

# A folder imports what stands before it, never what stands behind it; folders of one row do not import each other.
FLOORS = [
    {"numerics", "memory"},
    {"ir"},
    {"analysis"},
    {"calibration"},
    {"recipe"},
    {"passes"},
    {"modules", "pipeline"},
    {"checkpoint", "codegen"},
    {"backend", "generation"},
    {"api"},
    {"evaluation", "transformers_plugin"},
    {"training"},
    {"cli"},
]
FLOOR = {folder: index for index, folders in enumerate(FLOORS) for folder in folders}
AT_THE_ROOT = {"__init__.py", "__main__.py", "testing.py", "version.py"}
"""The front, what starts a command, what users test with, and what all may read."""

LAYER_NAMES = re.compile(
    r"\b(llama(?!\.cpp|-cli|-server)|qwen\d?|gemma\d?|mistral|mixtral|gpt_?neox|gpt-?2|falcon|phi-?3|opt-|bert|whisper|"
    r"[qkvo]_proj|gate_proj|up_proj|down_proj|embed_tokens|c_attn|fc[12])\b",
    re.IGNORECASE,
)


def name_of(path: Path) -> str:
    """The dotted name that a source file is imported by."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "qcompile" else ["qcompile", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "qcompile"}


def each_source(test):
    return pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))(test)


@each_source
def test_a_file_is_one_idea(path):
    text = path.read_text()
    assert text.count("\n") <= 300, "split it by idea"
    assert path.stem not in {"utils", "helpers", "common", "base", "manager"}
    assert ast.get_docstring(ast.parse(text)), "say what the file is for"
    assert not LAYER_NAMES.search(text), LAYER_NAMES.search(text)
    assert "/work/" not in text


@each_source
def test_folders_import_downwards(path):
    place = name_of(path).split(".")
    if len(place) < 3 and path.name in AT_THE_ROOT:
        return
    mine = place[1]
    for name in imports(path):
        parts = name.split(".")
        if len(parts) == 1:
            raise AssertionError("import the module that has it, not the front of the package")
        if parts[1] != mine and parts[1] != "version":
            assert FLOOR[parts[1]] < FLOOR[mine], f"{mine} may not import {name}"


def test_passes_and_targets_do_not_know_each_other():
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        other = {"codegen": "qcompile.passes", "passes": "qcompile.codegen"}.get(folder)
        assert other is None or not [name for name in imports(path) if name.startswith(other)], path


def test_no_circle_between_folders():
    """All folders, those inside passes/ and codegen/ too; a package's front (__init__) may name its own children."""
    arrows: dict[Path, set[Path]] = defaultdict(set)

    def room(path: Path) -> Path:
        """The folder of a file; files at the root of the package stand for themselves."""
        return path if path.parent == ROOT / "qcompile" else path.parent

    for path in SOURCES:
        for name in imports(path) & set(MODULES):
            here, there = room(path), room(MODULES[name])
            if here != there and not (path.name == "__init__.py" and here in there.parents):
                arrows[here].add(there)

    def reachable(start: Path) -> set[Path]:
        found: set[Path] = set()
        work = [start]
        while work:
            new = arrows[work.pop()] - found
            found |= new
            work += new
        return found

    circles = [str(folder.relative_to(ROOT)) for folder in list(arrows) if folder in reachable(folder)]
    assert not circles, circles


def test_no_name_twice():
    files, classes = defaultdict(list), defaultdict(list)
    for path in SOURCES:
        if path.name not in ("__init__.py", "__main__.py"):
            files[path.stem].append(path)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(path)
    twice = {name: places for found in (files, classes) for name, places in found.items() if len(places) > 1}
    assert not twice, twice


def has_logic(path: Path) -> bool:
    """Whether a file has a function of several statements: files of constants and plain data need no test."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            if len(body) > 1:
                return True
    return False


@each_source
def test_a_source_file_has_its_test_file(path):
    if path.name in ("__init__.py", "__main__.py") or not has_logic(path):
        return
    place = path.relative_to(ROOT).with_suffix("").parts
    place = place[1:] if place[0] == "qcompile" else place
    expected = ROOT.joinpath("tests", *place[:-1], f"test_{place[-1]}.py")
    assert expected.is_file(), f"no {expected.relative_to(ROOT)}"


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def test_tests_do_not_patch_by_dotted_strings():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
                first = node.args[0] if node.args else None
                assert not (isinstance(first, ast.Constant) and str(first.value).startswith("qcompile")), path


def test_packages_equal_folders():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name_of(path) for path in SOURCES if path.name == "__init__.py")
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), path


def code_files() -> list[Path]:
    folders = ("tests", "benches")
    return SOURCES + [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", code_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_retired_words(path):
    if path.name in ("retired_words.py", "test_house.py", "test_docs.py"):
        return
    found = faults(path.read_text(), str(path.relative_to(ROOT)))
    assert not found, found[:8]


@each_source
def test_retired_identifiers(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = (getattr(node, field, None) for field in ("id", "arg", "attr", "name"))
        found |= {name for name in names if isinstance(name, str)}
    assert not found & set(IDENTIFIERS), found & set(IDENTIFIERS)


def test_links_and_guards():
    for name in ("passes", "codegen"):
        assert (ROOT / "qcompile" / name).is_symlink()
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
        assert f"import qcompile.{name}, not {name}" in done.stderr
