"""What `import qcompile` gives, and what it does not import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from zoo import build

import qcompile
from qcompile.calibration.text import batches
from qcompile.modules.kv_cache import KVCache

ROOT = Path(__file__).parents[1]


def test_every_public_name_exists():
    assert len(set(qcompile.__all__)) == len(qcompile.__all__)
    assert all(getattr(qcompile, name) is not None for name in qcompile.__all__)
    assert qcompile.KVCache is KVCache and qcompile.calibration_batches is batches


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'qcompile' has no attribute 'quantize_it'"):
        _ = qcompile.quantize_it
    assert not hasattr(qcompile, "nothing")


def test_heavy_packages_are_imported_when_they_are_used():
    code = (
        "import sys, qcompile\n"
        "heavy = {'transformers', 'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'typer', 'gguf', 'hypothesis'}\n"
        "found = heavy & {name.partition('.')[0] for name in sys.modules}\n"
        "assert not found, found\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "qcompile.KVCache(8)\n"
        "assert 'transformers' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert qcompile.__version__ == version("torch-qcompile")


def test_names_in_error_texts_are_there_after_the_import():
    """Every `qcompile.a.b(` that a text of the sources prints."""
    folders = ("qcompile", "passes", "codegen")
    sources = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    found = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"\bqcompile((?:\.[A-Za-z_]\w*)+)\(", node.value))
    assert ".calibration_batches" in found and ".quantize" in found
    code = "import qcompile\n" + "".join(f"qcompile{name}\n" for name in sorted(found))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_fix_that_is_printed_for_missing_data_works():
    class Letters:
        model_max_length = 16

        def __call__(self, text, **_):
            return {"input_ids": [3 + ord(c) % 50 for c in text[:2000]]}

    model = build("llama")
    with pytest.raises(qcompile.RecipeError) as refusal:
        qcompile.quantize(model, "w4a16-gptq", progress=False)
    code = "\n".join(line.strip() for line in str(refusal.value).partition("Fix:")[2].strip().splitlines())
    exec(code, {"qcompile": qcompile, "model": model, "tokenizer": Letters()})
    assert any(isinstance(module, qcompile.QuantLinear) for module in model.modules())


def test_no_module_of_unix_is_imported_at_the_top():
    unix = {"resource", "fcntl", "pwd", "grp", "termios", "tty"}
    for folder in ("qcompile", "passes", "codegen"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
                names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
                assert not names & unix, path
    code = "import sys; sys.modules['resource'] = None; import qcompile, qcompile.cli"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
