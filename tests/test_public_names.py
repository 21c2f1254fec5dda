"""What `import qcompile` gives, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qcompile
from qcompile.calibration.text import batches
from qcompile.modules.kv_cache import KVCache


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
