"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    p
    for folder in ("qcompile", "passes", "codegen")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if "qcompile/passes" not in str(p) and "qcompile/codegen" not in str(p)
]
CORE = {
    "program", "capture", "normalise", "norms", "sites", "scale_flow", "row_flow", "attention_flow", "rotation_flow",
    "formats", "rounding", "packing", "minifloat", "walk", "hadamard", "integer_product", "ops", "sharing",
    "fingerprint", "calibrate", "recipe", "report", "verify", "memory", "straight_through", "divergence",
}  # fmt: skip
NAMES = re.compile(
    r"\b(llama|qwen\d?|gemma\d?|mistral|mixtral|gpt_?neox|gpt-?2|falcon|phi-?3|opt-|bert|whisper|lm_head|"
    r"[qkvo]_proj|gate_proj|up_proj|down_proj|embed_tokens|c_attn|fc[12])\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files(path):
    text = path.read_text()
    assert text.count("\n") <= 300, "split it by idea"
    assert path.stem not in {"utils", "helpers", "common", "base", "manager"}
    assert ast.get_docstring(ast.parse(text)), "say what the file is for"
    assert not NAMES.search(text), NAMES.search(text)
    assert "/work/" not in text


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {f for f in found if f.startswith("qcompile")}


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path):
    mine = imports(path)
    where = path.relative_to(ROOT).parts
    if where[0] == "qcompile" and path.stem in CORE:
        assert not [m for m in mine if m.split(".")[1] not in CORE], mine
    if where[0] == "passes":
        assert not [m for m in mine if m.startswith("qcompile.codegen")]
        assert all(m.split(".")[1] in CORE | {"passes"} for m in mine)
    if where[0] == "codegen":
        assert not [m for m in mine if m.startswith("qcompile.passes")]


def test_links_and_guards():
    for name in ("passes", "codegen"):
        assert (ROOT / "qcompile" / name).is_symlink()
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
        assert f"import qcompile.{name}, not {name}" in done.stderr
