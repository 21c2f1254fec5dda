"""A package holds each weight once, and is refused in one sentence where it is damaged or made for something else."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch
from torch import nn

from qcompile.backend import package_archive
from qcompile.backend.ahead_of_time import CompiledGraph
from qcompile.backend.package_archive import PackageFile, write_archive
from qcompile.checkpoint.atomic_folder import CheckpointError

WEIGHTS = {
    "a": torch.arange(12, dtype=torch.int8).view(3, 4),
    "transposed": torch.randn(4, 3).t(),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two graphs that share weights; their libraries are texts, which are not run."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "g.so").write_text("a library")
    graphs = {
        "one": CompiledGraph((folder / "g.so",), WEIGHTS),
        "two": CompiledGraph((folder / "g.so",), {"b": WEIGHTS["a"].clone(), "c": torch.randn(100_000)}),
    }
    written = write_archive(folder / "p.pt2", graphs, {"config.json": b"{}", "deep/x": b"\0\xff"}, {"kind": "test"})
    assert written == (folder / "p.pt2").stat().st_size
    return folder / "p.pt2"


def changed(path, to, **fields):
    """A copy whose description says something else."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("description"):
                data = json.dumps({**json.loads(data), **fields}).encode()
            new.writestr(entry.filename, data)
    return to


def test_what_was_written_is_read(path):
    opened = PackageFile(path)
    assert opened.files() == {"config.json": b"{}", "deep/x": b"\0\xff"} and opened.description["kind"] == "test"
    found = opened._weights()
    assert set(found) == {"one", "two"} and set(found["one"]) == set(WEIGHTS)
    for name, weight in WEIGHTS.items():
        got = found["one"][name]
        assert torch.equal(got, weight) and got.dtype == weight.dtype and got.stride() == weight.stride(), name
        assert got.data_ptr() % 64 == 0
    assert found["two"]["b"].data_ptr() == found["one"]["a"].data_ptr()
    with zipfile.ZipFile(path) as archive:
        records = [name for name in archive.namelist() if "/data/weights/" in name]
    assert len(records) == 5


def test_a_changed_weight_is_noticed(path, tmp_path):
    copied = shutil.copy(path, tmp_path / "p.pt2")
    with zipfile.ZipFile(copied) as archive:
        entry = max((e for e in archive.infolist() if "/data/weights/" in e.filename), key=lambda e: e.file_size)
    with open(copied, "r+b") as file:
        file.seek(entry.header_offset + 5000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match="weight_. was changed"):
        PackageFile(copied)._weights()


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"format": 2}, "has format 2"),
        ({"torch": "1.0.0"}, "made with torch 1.0.0.* or install torch 1.0.0"),
        ({"processor": "abacus"}, "on abacus, and this is"),
        ({"system": "Plan 9"}, "for Plan 9 on"),
        ({"instructions": ["avx9"]}, "has not: avx9"),
        ({"operators": "0" * 16}, "other operators"),
    ],
)
def test_a_package_for_something_else(path, tmp_path, fields, words):
    with pytest.raises(CheckpointError, match=words) as refused:
        PackageFile(changed(path, tmp_path / "p.pt2", **fields))
    assert "Fix: package the model again" in str(refused.value)


def test_what_is_no_package(path, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        PackageFile(tmp_path / "nothing.pt2")
    text, cut, foreign = (tmp_path / f"{name}.pt2" for name in ("text", "cut", "foreign"))
    text.write_text("hello")
    cut.write_bytes(path.read_bytes()[:-2000])
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),)), foreign)
    for other in (text, cut, foreign):
        with pytest.raises(CheckpointError, match=r"no package of qcompile, or it is damaged .*\. Fix: write it"):
            PackageFile(other)


def test_a_library_that_cannot_be_loaded(path):
    with pytest.raises(CheckpointError, match=r"cannot be loaded .* Fix: package"):
        PackageFile(path).open_graphs()


def test_an_interruption_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "p.pt2"
    target.write_text("old")
    monkeypatch.setattr(package_archive, "native_library", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_archive(target, {}, {}, {})
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_the_instructions_are_those_of_this_processor():
    here = package_archive._machine()
    assert here["torch"] == torch.__version__.split("+")[0] and here["instructions"] == sorted(here["instructions"])
    capabilities = torch.cpu.get_capabilities()
    assert all(capabilities[name] is True for name in here["instructions"])
    assert ("avx2" in here["instructions"]) == bool(capabilities.get("avx2"))
    assert not {"sha", "amx_tile"} & set(here["instructions"])
