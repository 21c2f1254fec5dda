"""transformers knows our quantizer whichever package is imported first; without qcompile it refuses our folders."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest
from zoo import build, example

import qcompile
from qcompile.transformers_plugin import registration
from qcompile.transformers_plugin.hf_quantizer import QCompileHfQuantizer
from qcompile.transformers_plugin.qcompile_config import QCompileConfig

ORDERS = {
    "qcompile first": "import qcompile, sys; assert 'transformers' not in sys.modules; import transformers",
    "transformers first": "import transformers, qcompile",
    "a model class first": "import transformers; transformers.LlamaForCausalLM; import qcompile",
}


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A quantized model in one file and in several."""
    root = tmp_path_factory.mktemp("plugin")
    model = build("llama")
    qcompile.quantize(model, "w4a16", example=example("llama"), progress=False)
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "several", max_shard_size="40KB")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_both_orders_of_import(order, folders):
    code = ORDERS[order] + (
        "\nm = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
        "\nassert type(m.lm_head) is qcompile.QuantLinear, type(m.lm_head)"
        "\nimport transformers.quantizers.auto as auto"
        "\nassert type(auto.__loader__).__name__ == 'SourceFileLoader' and auto.__spec__.loader is auto.__loader__"
    )
    done = run("import sys\n" + code, folders / "one")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_qcompile_no_folder_opens_as_a_random_model(folders):
    """Neither as it is, nor by a loader that reads no `transformers_weights`: it finds no file of a known name."""
    for name in ("one", "several"):
        older = folders / f"{name} for an older loader"
        older.mkdir()
        for path in (folders / name).iterdir():
            (older / path.name).write_bytes(path.read_bytes())
        config = json.loads((older / "config.json").read_text())
        del config["transformers_weights"]
        (older / "config.json").write_text(json.dumps(config))
    code = (
        "import sys, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except (ValueError, OSError) as error:\n"
        "        print(type(error).__name__, str(error).replace('\\n', ' '))\n"
        "    else:\n"
        "        print('opened')\n"
    )
    done = run(code, *sorted(folders.iterdir()))
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    for line in (lines[0], lines[2]):
        assert "import qcompile before, or read this folder with qcompile.load" in line
    for line in (lines[1], lines[3]):
        assert line.startswith("OSError") and "no file named model.safetensors" in line


def test_registering_twice_is_harmless():
    tables = sys.modules[registration.TABLES]
    before = len(sys.meta_path)
    registration.register_when_imported()
    assert tables.AUTO_QUANTIZER_MAPPING["qcompile"] is QCompileHfQuantizer
    assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING["qcompile"] is QCompileConfig
    assert len(sys.meta_path) == before


def test_a_transformers_with_other_tables_is_named():
    with pytest.warns(UserWarning, match="does not take qcompile's quantizer .*Fix: pip install -U transformers"):
        registration.register(ModuleType("other"))


def test_the_module_has_its_own_loader_again(tmp_path, monkeypatch):
    """Found by the import system as any module is, and registered right after it was executed."""
    (tmp_path / "tables_of_a_test.py").write_text(
        "AUTO_QUANTIZER_MAPPING = {}\nAUTO_QUANTIZATION_CONFIG_MAPPING = {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registration, "TABLES", "tables_of_a_test")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != registration.__name__]
    registration.register_when_imported()
    finder = sys.meta_path.pop(0)
    monkeypatch.setattr(sys, "meta_path", [finder, *(f for f in sys.meta_path if "pytest" not in type(f).__module__)])
    assert len([f for f in sys.meta_path if type(f).__module__ == registration.__name__]) == 1
    import tables_of_a_test

    monkeypatch.delitem(sys.modules, "tables_of_a_test")
    assert tables_of_a_test.AUTO_QUANTIZER_MAPPING == {"qcompile": QCompileHfQuantizer}
    assert type(tables_of_a_test.__loader__).__name__ == "SourceFileLoader"
