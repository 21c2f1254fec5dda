"""A packaged causal LM in a process of its own, in Python and in C++, says what the model said."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_text_models import greedy, quantized_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import qcompile
from qcompile.api import load_package
from qcompile.backend.package_archive import PackageFile
from qcompile.checkpoint.atomic_folder import CheckpointError

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "examples" / "cpp_package" / "main.cpp"

OPEN = """
import sys, torch
from torch._inductor.cpp_builder import CppBuilder
def refuse(self): raise AssertionError("something is compiled")
CppBuilder.build = refuse
import qcompile
model = qcompile.load_package(sys.argv[1])
assert model.tokenizer is None
ids = torch.tensor([[int(word) for word in sys.argv[2:]]])
fixed = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
print(*model.generate(ids, **fixed)[0, ids.shape[1] :].tolist())
"""


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A model, its package, and prompts with the tokens that the model continues them with, as texts."""
    model = quantized_llama()
    path = tmp_path_factory.mktemp("package") / "m.pt2"
    qcompile.package(model, path)
    prompts = [torch.randint(90, (1, length), generator=torch.Generator().manual_seed(length)) for length in (1, 2, 11)]
    said = {}
    for ids in prompts:
        said[" ".join(map(str, ids[0].tolist()))] = " ".join(map(str, greedy(model, ids)[0, ids.shape[1] :].tolist()))
    return model, path, said


def test_what_is_no_package(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        qcompile.load_package(tmp_path / "m.pt2")
    (tmp_path / "m.pt2").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no package of qcompile"):
        qcompile.load_package(tmp_path / "m.pt2")


class _Files(PackageFile):
    """A package that holds these files, beside a graph that doubles."""

    def __init__(self, files):
        self.path, self._files = Path("m.pt2"), files
        inputs = [{"path": "x", "dtype": "float32", "sizes": ["s0"]}]
        outputs = {"kind": "tensor", "names": [""]}
        call = {"parameters": ["x"], "inputs": inputs, "constants": {}, "outputs": outputs}
        self.description = {"kind": "module", **call}

    def files(self):
        return self._files

    def open_graphs(self):
        return {"module": lambda inputs: [2 * inputs[0]]}


def test_files_beside_a_module(monkeypatch, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?")))
    tokenizer.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for given in (files, {}):
        monkeypatch.setattr(load_package, "PackageFile", lambda _, given=given: _Files(given))
        model = qcompile.load_package("m.pt2")
        assert torch.equal(model(torch.ones(3)), torch.full((3,), 2.0))
        assert model.tokenizer("a")["input_ids"] == [0] if given else model.tokenizer is None
    monkeypatch.setattr(load_package, "PackageFile", lambda _: _Files({"../outside": b"x"}))
    with pytest.raises(CheckpointError, match=r"holds a file \.\./outside"):
        qcompile.load_package("m.pt2")


@pytest.mark.slow
def test_another_process_opens_it_without_compiling(packaged):
    _, path, said = packaged
    for prompt, want in said.items():
        done = subprocess.run(
            [sys.executable, "-c", OPEN, path, *prompt.split()], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == want


@pytest.mark.slow
def test_cpp_decodes_the_same_tokens(packaged, tmp_path):
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    _, path, said = packaged
    (libraries,) = library_paths()
    flags = [
        "-std=c++20",
        *(f"-I{include}" for include in include_paths()),
        f"-L{libraries}",
        f"-Wl,-rpath,{libraries}",
    ]
    program = tmp_path / "decode"
    names = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run([compiler, str(SOURCE), "-o", str(program), *flags, *names], check=True)
    for prompt, want in said.items():
        done = subprocess.run([program, path, "12", *prompt.split()], env={}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == want
    failed = subprocess.run([program, SOURCE, "12", "3"], env={}, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("decode: ")


@pytest.mark.slow
def test_the_file_holds_each_weight_once(packaged):
    model, path, _ = packaged
    with zipfile.ZipFile(path) as archive:
        sizes = {e.filename.split("/", 1)[1]: e.file_size for e in archive.infolist()}
    weights = sum(size for name, size in sizes.items() if name.startswith("data/weights/"))
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert weights < 1.2 * stored  # rows of packed weights are filled up to sixteen
    libraries = {name.split("/")[2] for name in sizes if name.endswith(".so") and "aotinductor" in name}
    assert libraries == {"prompt", "step"} and "data/qcompile/operators.so" in sizes
    assert not [name for name in sizes if name.endswith((".cpp", ".o"))]


@pytest.mark.slow
def test_the_operators_need_no_python(packaged, tmp_path):
    """What a library names and does not have, and the libraries that it asks for."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    with zipfile.ZipFile(packaged[1]) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                (tmp_path / "l.so").write_bytes(archive.read(name))
                listed = [readelf, "--dynamic", "--dyn-syms", "--wide", str(tmp_path / "l.so")]
                text = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
                undefined = [line.split()[-1] for line in text.splitlines() if " UND " in line]
                assert len(undefined) > 10 and not [n for n in undefined if n.startswith(("Py", "_Py"))], name
                assert "torch_python" not in text and "libpython" not in text
