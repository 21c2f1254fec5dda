"""What README, CONTRIBUTING and docs/ name exists: paths, links, commands, options, names, presets; and their words."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import typer.main
from doc_pages import PAGES, ROOT, blocks
from retired_words import faults

import qcompile.passes
from qcompile.backend.options import OPTIONS
from qcompile.cli import app
from qcompile.codegen.onnx.onnx_options import OnnxOptions
from qcompile.pipeline.presets import PRESETS
from qcompile.pipeline.training_presets import TRAINING_PRESETS
from qcompile.recipe.registry import registered

FOLDERS = ("qcompile", "passes", "codegen", "benches", "tests", "docs", ".ci")
ROOT_FILES = re.compile(r"`((?:pyproject\.toml|Makefile|README\.md|CONTRIBUTING\.md))`")
COMMANDS = typer.main.get_command(app)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def prose(text: str) -> str:
    """A page without its code blocks of Python."""
    return re.sub(r"```python\n.*?```", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-") for title in titles}


def commands(text: str) -> list[list[str]]:
    """Every `qcompile ..` that a text shows, as words; in code spans and indented lines only."""
    spans = re.findall(r"`(qcompile [^`\n]*(?:\n[^`]*)?)`", text) + re.findall(
        r"^ {4,}(qcompile .*)$", text, flags=re.M
    )
    return [re.split(r"\s{3,}|\s#", span)[0].split() for span in spans]


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(there), f"{target}: {sorted(anchors(there))}"


@pages
def test_every_page_is_linked(page):
    linked = {
        (other.parent / target.partition("#")[0]).resolve()
        for other in PAGES
        if other != page
        for target in re.findall(r"\]\(([^)\s]+)\)", other.read_text())
    }
    assert page in linked or page.name == "README.md"


@pages
def test_paths_exist(page):
    text = page.read_text()
    found = re.findall(rf"(?<![\w/.])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*[\w/])", text)
    for name in {*found, *ROOT_FILES.findall(text)}:
        assert (ROOT / name).exists() or list(ROOT.glob(name)), f"{name} does not exist"
    # A file named without its folder, or from a folder on: names are unique over the project.
    written = {"qcompile.json", "config.json", "genai_config.json", "mine.json"}  # by the commands that a page shows
    for name in set(re.findall(r"`([\w/]+\.(?:py|cpp|json))`", text)) - written:
        there = (path for folder in FOLDERS for path in (ROOT / folder).rglob(Path(name).name))
        assert any(str(path).endswith(f"/{name}") for path in there), f"{name} does not exist"


@pages
def test_commands_exist(page):
    for words in commands(page.read_text()):
        command, rest = COMMANDS, words[1:]
        while rest and hasattr(command, "commands"):
            if not re.fullmatch(r"[a-z][a-z-]*", rest[0]):  # `qcompile COMMAND MODEL`
                break
            assert rest[0] in command.commands, f"{' '.join(words)}: no command {rest[0]!r}"
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter_names(parameter)}
        for word in rest:
            option = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][a-z-]*", option):
                assert option in {*known, "--help"}, f"{' '.join(words)}: no option {option}"


@pages
def test_options_of_commands_exist(page):
    known = {
        option
        for _, command in every_command()
        for parameter in command.params
        for option in parameter_names(parameter)
    }
    foreign = {"--no-deps", "--index-url", "--quick", "--commit"}  # of pip and of benches
    for option in re.findall(r"`(--[a-z][a-z-]*)", page.read_text()):
        assert option in known | foreign, f"no command has {option}"


def every_command(command=COMMANDS, name="qcompile"):
    """All commands with their full names, those of groups too."""
    if not hasattr(command, "commands"):
        yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{name} {word}")


def parameter_names(parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


@pages
def test_python_blocks_compile_and_their_names_exist(page):
    for block in blocks(page):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qcompile"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qcompile":
                assert hasattr(qcompile, node.attr), f"qcompile has no {node.attr}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                check_fields(node)


def check_fields(call: ast.Call) -> None:
    """Keyword arguments of a pass config are fields of it."""
    config = getattr(qcompile.passes, call.func.id, None)
    if isinstance(config, type) and dataclasses.is_dataclass(config):
        unknown = {k.arg for k in call.keywords} - {f.name for f in dataclasses.fields(config)}
        assert not unknown, f"{config.__name__} has no {unknown}"


@pages
def test_dotted_names_in_prose_exist(page):
    for name in re.findall(r"`(qcompile(?:\.\w+)+)", prose(page.read_text())):
        parts = name.split(".")
        if parts[-1] in {"json", "safetensors"} or parts[1] == "ops":
            continue
        found = qcompile
        for part in parts[1:]:
            path = f"{found.__name__}.{part}" if hasattr(found, "__path__") else ""
            if path and not hasattr(found, part):
                importlib.import_module(path)
            assert hasattr(found, part), f"{name} does not exist"
            found = getattr(found, part)


@pages
def test_presets_in_tables_exist(page):
    own = {path.stem for path in (ROOT / "benches" / "recipes").rglob("*.json")}
    kinds = re.compile(r"`((?:int8|fp8|fp4|w\d+a\d+|w4row|kv\d|int4)(?:kv\d)?(?:-[a-z0-9]+)*)`")
    formats = {"int8", "fp8", "fp4", "int4", "int2", "int3"}
    for line in page.read_text().splitlines():
        for name in kinds.findall(line) if line.startswith("|") else []:
            assert name in {*PRESETS, *TRAINING_PRESETS, *own, *formats}, f"no preset {name}"


@pages
def test_tables_are_those_of_the_results(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benches")
    text, update_docs = page.read_text(), importlib.import_module("update_docs")
    assert update_docs.updated(text) == text, "run benches/update_docs.py"
    for mark in re.findall(r"<!-- ([\w-]+)", text):
        assert mark in {*update_docs.TABLES, "end"}, f"no table {mark}"


@pages
def test_words(page):
    found = faults(page.read_text(), str(page.relative_to(ROOT)))
    assert not found, "\n".join(found)


@pages
def test_pages_are_short(page):
    text = page.read_text()
    assert "/work/" not in text and "/tmp/" not in text
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 200


# -- the reference is complete ---------------------------------------------------------------------


def rows(page: str) -> dict[str, str]:
    """First cell of every table row of a page, by the code spans in it -> the row."""
    lines = (ROOT / "docs" / "reference" / page).read_text().splitlines()
    cells = [(line.split("|")[1], line) for line in lines if line.startswith("|")]
    return {name: line for cell, line in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_reference_has_every_preset():
    text = (ROOT / "docs" / "reference" / "recipes.md").read_text()
    missing = [name for name in (*PRESETS, *TRAINING_PRESETS) if f"`{name}`" not in text]
    assert not missing
    table = rows("recipes.md")
    for name, recipe in PRESETS.items():
        if name in table:
            assert ("| yes |" in table[name]) == bool(recipe.needs), f"{name}: data?"


def test_reference_has_every_pass_and_field():
    table = rows("recipes.md")
    for config, entry in registered().items():
        row = table[config.__name__]
        assert ("| yes |" in row) == entry.exact
        inherited = re.search(r"as `(\w+)`", row)
        base = getattr(qcompile.passes, inherited[1]) if inherited else object
        known = {f.name: f.default for f in dataclasses.fields(base)} if inherited else {}
        for field in dataclasses.fields(config):
            default = field.default
            plain = isinstance(default, int | float | tuple | None)
            text = repr(default) if plain else f'"{default}"'
            if known.get(field.name, dataclasses.MISSING) != default:
                assert f"{field.name}={text}" in row, f"{config.__name__}.{field.name}={text}"


def test_reference_has_every_option():
    table = rows("options.md")
    assert set(OPTIONS) <= set(table)
    for field in dataclasses.fields(OnnxOptions):
        default = field.default
        assert field.name in table and f"| `{default}` |" in table[field.name].replace("| 4 |", "| `4` |")
    text = (ROOT / "docs" / "reference" / "options.md").read_text()
    for name, command in every_command():
        row = next(line for line in text.splitlines() if re.match(rf"\| `{name}\b", line))
        for parameter in command.params:
            names = [n for n in parameter_names(parameter) if n.startswith("--")]
            assert not names or any(f"`{n}`" in row for n in names), f"{name} {names}"
