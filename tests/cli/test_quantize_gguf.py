"""`qcompile quantize IN.gguf OUT.gguf`: what is refused before a model is read, and a file from a file."""

from __future__ import annotations

import functools
import json
import re

import gguf
import pytest
from served_models import decoder, ids, quantized, write_template

from qcompile.checkpoint.stored_gguf import stored_gguf
from qcompile.checkpoint.writers import gguf_template
from qcompile.checkpoint.writers.gguf_file import write_gguf
from qcompile.checkpoint.writers.gguf_template import GgufTemplate
from qcompile.cli import quantize_export, quantize_gguf
from qcompile.generation import pretrained
from qcompile.passes import Fuse, Quantize
from qcompile.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A float file without a tokenizer."""
    return write_template(decoder(), tmp_path_factory.mktemp("gguf") / "float.gguf")


@pytest.fixture
def loaded(monkeypatch):
    """Names of the models that were read; a file here has no tokenizer."""
    names = []

    def load(name, dtype="float32", *, stream):
        assert stream, "weights stay in the file"
        names.append(name)
        return decoder(), None

    monkeypatch.setattr(quantize_gguf, "load", load)
    monkeypatch.setattr(quantize_gguf, "calibration_batches", lambda *arguments: [ids()])
    return names


def test_a_file_is_quantized_into_a_file(floats, tmp_path, call, loaded):
    out = call("quantize", floats, tmp_path / "out.gguf", "--recipe", "gguf-q4_k")
    assert loaded == [str(floats)] and [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    lines = [line.split() for line in out.splitlines()]
    assert ["Q4_K", "1", "0.0", "4.50"] in lines and ["Q8_0", "1", "0.0", "8.50"] in lines
    assert any(line[:2] == ["all", "12"] for line in lines) and "recipe gguf-q4_k: 8 of 8 sites" in out
    assert f"written: {tmp_path / 'out.gguf'}  (0." in out and "note: " not in out
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "out.gguf")).tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("Q4_K", "Q4_1")


def test_a_file_that_is_read_in_parts_becomes_the_same_file(floats, tmp_path, call, monkeypatch):
    monkeypatch.setattr(quantize_gguf, "calibration_batches", lambda *arguments: [ids()])
    monkeypatch.setattr(pretrained, "_tokenizer", lambda *_, **__: None)  # the file has none
    read, parts = [], functools.partial(stored_gguf, small=0)
    monkeypatch.setattr(pretrained, "stored_gguf", lambda *given: read.append(given[0]) or parts(*given))
    call("quantize", floats, tmp_path / "parts.gguf", "-r", "gguf-q4_k")
    assert read == [floats]
    monkeypatch.setattr(quantize_gguf, "is_read_in_parts", lambda name: False)
    monkeypatch.setattr(gguf_template, "reads_in_parts", lambda path: False)
    call("quantize", floats, tmp_path / "whole.gguf", "-r", "gguf-q4_k")
    assert read == [floats] and (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_file_becomes_a_folder_in_parts(floats, tmp_path, call, monkeypatch):
    monkeypatch.setattr(pretrained, "_tokenizer", lambda *_, **__: None)
    out = " ".join(call("quantize", floats, tmp_path / "q", "-r", "w8a16", "--memory", "4GB").split())
    assert "needs about 0.80 GB of memory" in out and "8 of 8 sites" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_a_file_that_is_quantized_already_is_named(floats, tmp_path, call, loaded):
    first, second = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    write_gguf(quantized("int8/group32/f16"), GgufTemplate(floats), first)
    words = " ".join(call("quantize", first, second, "-r", "gguf-q4_0").split())
    assert "note: q8.gguf holds Q8_0 already: what was rounded is rounded again. Fix: take the F16 or BF16" in words


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("int8", "recipe 'int8': activations in int8/row .*or use a preset gguf-"),
        ("w4a16", "recipe 'w4a16': weights in int4/group128/zero, which gguf cannot say"),
        ("serve-w4a16", "Fix: quantize to int4/group128/f16"),
        ("auto", "recipe 'auto' chooses formats for PyTorch. Fix: -r gguf-q4_k"),
        ("gguf-q5_k", "unknown recipe 'gguf-q5_k'"),
    ],
)
def test_recipes_that_gguf_cannot_say_are_refused_before_the_model_is_read(
    floats, tmp_path, fail, loaded, recipe, words
):
    line = fail("quantize", floats, tmp_path / "out.gguf", "-r", recipe)
    assert re.search(words, line), line
    assert not loaded and not list(tmp_path.iterdir())


def test_places_that_do_not_fit_are_refused(floats, tmp_path, fail, loaded):
    there = tmp_path / "there.gguf"
    there.touch()
    assert "there.gguf exists. Fix: choose another name, or remove it" in fail("quantize", floats, there)
    line = fail("quantize", "some/folder", tmp_path / "out.gguf", "-r", "gguf-q4_k")
    assert "is made after a GGUF file, and some/folder is none. Fix: name a folder to write, or qcompile export" in line
    assert not loaded and [p.name for p in tmp_path.iterdir()] == ["there.gguf"]


def test_what_goes_with_parts_is_refused_of_a_file_that_is_read_whole(floats, tmp_path, fail, loaded, monkeypatch):
    for module in (quantize_export, quantize_gguf):
        monkeypatch.setattr(module, "is_read_in_parts", lambda name: False)
    for flag, value in [("--memory", "1GB"), ("--resume", None), ("--dump", tmp_path / "d")]:
        given = [flag] if value is None else [flag, value]
        line = fail("quantize", floats, tmp_path / "out.gguf", "-r", "gguf-q4_k", *given)
        assert line.startswith(f"error: {flag} goes with ") and "Fix: drop it" in line
    assert not loaded and not list(tmp_path.iterdir())


def test_a_report_and_a_limit_of_memory(floats, tmp_path, call, loaded):
    given = "--memory", "2GB", "--report", tmp_path / "r.html", "--dump", tmp_path / "d"
    out = " ".join(call("quantize", floats, tmp_path / "out.gguf", "-r", "gguf-q8_0", *given).split())
    assert "needs about 0.80 GB of memory" in out and "written: " in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "out.gguf", "r.html"] and list(
        (tmp_path / "d").iterdir()
    )


def test_the_format_of_the_logits_is_checked_too(floats, tmp_path, fail, loaded):
    passes = (Quantize("int8/group32/f16", None, lm_head="fp8/row"), Fuse())
    path = tmp_path / "own.json"
    path.write_text(json.dumps(Recipe("own", passes).to_json()))
    line = fail("quantize", floats, tmp_path / "out.gguf", "-r", path)
    assert "recipe 'own', logits: weights in fp8/row, which gguf cannot say" in line and not loaded
