"""A GGUF file is parsed once for all that transformers asks of it, and says the same as parsed each time."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers
from served_models import decoder, write_template

from qcompile.checkpoint.gguf_reads import parsed_once


@pytest.fixture(scope="module")
def model():
    return decoder()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return write_template(model, tmp_path_factory.mktemp("gguf") / "float.gguf")


def loaded(file):
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")


def test_transformers_parses_a_file_once_and_reads_the_same(file, model, monkeypatch):
    parsed, tables = [], []
    read, table = gguf.GGUFReader.__init__, gguf.get_tensor_name_map

    def counted_read(self, path, *more):
        parsed.append(str(path))
        read(self, path, *more)

    def counted_table(*which):
        tables.append(which)
        return table(*which)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted_read)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted_table)
    with parsed_once():
        found = loaded(file)
    assert parsed == [str(file)] and len(tables) == 1
    loaded(file)
    assert len(parsed) > 2 and len(tables) > 2, "outside, everything is as before"
    assert gguf.get_tensor_name_map is counted_table
    weights = model.state_dict()
    assert found.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())


def test_a_damaged_file_leaves_the_library_as_it_was(tmp_path):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(Exception), parsed_once():  # noqa: B017, PT011 - whatever the library raises
        loaded(tmp_path / "x.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
