"""Solved sites come back as they were kept, of this run only, and damage is named."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import Together

from qcompile.calibration import ranks as ranks_module
from qcompile.calibration.ranks import Ranks, RanksError
from qcompile.checkpoint import finished_folder as module
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.finished_folder import LOG, FinishedFolder
from qcompile.memory.fingerprint import as_bytes
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.recipe.solved_sites import SolvedSites

RUN = {"recipe": "r", "model": "m", "batches": "b", "versions": "v"}
FORMATS = ["int4/group32/zero", "int8", "fp8", "int4/group32/floatzero", "int4/group32/zero/dual", "int8/tensor"]


def opened_folder(path, *, resume=False, run=RUN):
    return FinishedFolder(path, run, resume=resume, ranks=Ranks())


def solved_sites(formats, seed=0, **rest):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(4 + i, 64, generator=generator) for i in range(len(formats))]
    parts = [quantize_tensor(w, Format.parse(f)).stored_parts for w, f in zip(weights, formats, strict=True)]
    return SolvedSites(parts, **rest)


def assert_same(found, kept):
    assert (found.fell_back, found.damage) == (kept.fell_back, kept.damage)
    assert len(found.parts) == len(kept.parts)
    for ours, theirs in zip(found.parts, kept.parts, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape
                assert torch.equal(as_bytes(a.clone()), as_bytes(b.contiguous()))


@settings(max_examples=10)
@given(
    st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3),
    st.integers(0, 99),
    st.one_of(st.none(), st.tuples(st.floats(0, 1), st.floats(0, 1))),
)
def test_what_is_kept_is_found_by_another_run(tmp_path_factory, formats, seed, damage):
    path = tmp_path_factory.mktemp("run") / "out.unfinished"
    names = [f"layers.{seed}.site/{i}" for i in range(len(formats))]
    solved = solved_sites(formats, seed, fell_back=names[:1], damage=damage)
    first = opened_folder(path)
    assert not first.has(names)
    first.add(names, solved)
    assert_same(first.find(names), solved)
    assert not first.has(names) and first.earlier == 0, "an earlier run is one that ended before"
    second = opened_folder(path, resume=True)
    assert (
        second.earlier == 1
        and second.has(names)
        and not second.has([*names, "more"])
        and not second.has([*names[:-1], "other"])
    )
    assert_same(second.find(names), solved)


def test_names_that_differ_in_a_mark_have_files_of_their_own(tmp_path):
    folder = opened_folder(tmp_path / "u")
    names = [["a.b/c"], ["a.b:c"], ["a.b", "c"], ["x" * 300], ["y" * 300]]
    for seed, sites in enumerate(names):
        folder.add(sites, solved_sites(["int8"] * len(sites), seed))
    for seed, sites in enumerate(names):
        assert_same(folder.find(sites), solved_sites(["int8"] * len(sites), seed))


def test_the_log_has_a_line_for_each_group(tmp_path):
    folder = opened_folder(tmp_path / "u")
    folder.add(["a", "b"], solved_sites(["int8", "int8"], fell_back=["b"], damage=(0.5, 0.25)))
    folder.add(["c"], solved_sites(["fp8"]))
    first, second = map(json.loads, (tmp_path / "u" / LOG).read_text().splitlines())
    assert first["sites"] == ["a", "b"] and first["damage"] == [0.5, 0.25] and first["fell_back"] == ["b"]
    assert first["rank"] == 0 and first["seconds"] >= 0 and first["resident_bytes"] > 1 << 20
    assert second["sites"] == ["c"] and second["damage"] is None


def test_remains_need_to_be_asked_for(tmp_path):
    opened_folder(tmp_path / "u")
    with pytest.raises(CheckpointError, match="holds what an earlier run finished. Fix: resume it .--resume.*remove"):
        opened_folder(tmp_path / "u")
    assert opened_folder(tmp_path / "x", resume=True).earlier == 0, "a job that is started again needs no other command"
    (tmp_path / "foreign").mkdir()
    with pytest.raises(CheckpointError, match="foreign exists and is of no run of ours. Fix: remove it"):
        opened_folder(tmp_path / "foreign", resume=True)
    assert not list((tmp_path / "foreign").iterdir())


@pytest.mark.parametrize("name", sorted(RUN))
def test_another_run_is_refused_by_what_differs(tmp_path, name):
    opened_folder(tmp_path / "u").add(["a"], solved_sites(["int8"]))
    changed = {**RUN, name: "other" * 40}
    with pytest.raises(CheckpointError, match=f"of another run: its {name} is '{RUN[name]}', and this.*'other.*Fix"):
        opened_folder(tmp_path / "u", resume=True, run=changed)
    with pytest.raises(CheckpointError, match="of another run: its new is None"):
        opened_folder(tmp_path / "u", resume=True, run={**RUN, "new": "x"})
    assert opened_folder(tmp_path / "u", resume=True).has(["a"]), "a refusal removes nothing"


def test_a_damaged_description_is_refused(tmp_path):
    opened_folder(tmp_path / "u")
    (tmp_path / "u" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="run.json.*Fix: remove .*u, and run without resume"):
        opened_folder(tmp_path / "u", resume=True)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [flip, lambda file: file.write_bytes(file.read_bytes()[:-5]), lambda f: f.unlink()])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, harm):
    opened_folder(tmp_path / "u").add(["layer.a"], solved_sites(["int8"]))
    folder = opened_folder(tmp_path / "u", resume=True)
    (file,) = (tmp_path / "u" / "sites").iterdir()
    harm(file)
    with pytest.raises(CheckpointError, match=r"layer\.a-\w+\.safetensors .*Fix: "):
        folder.find(["layer.a"])


def test_a_file_under_the_name_of_others_is_refused(tmp_path):
    folder = opened_folder(tmp_path / "u")
    folder.add(["a"], solved_sites(["int8"]))
    (own,) = (tmp_path / "u" / "sites").iterdir()
    folder.add(["b"], solved_sites(["int8"]))
    (other,) = set((tmp_path / "u" / "sites").iterdir()) - {own}
    other.write_bytes(own.read_bytes())
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.find(["b"])


def test_what_was_not_finished_is_not_there(tmp_path):
    folder = opened_folder(tmp_path / "u")
    folder.add(["a"], solved_sites(["int8"]))
    (file,) = (tmp_path / "u" / "sites").iterdir()
    partial = file.with_suffix(".partial")
    file.rename(partial)
    (folder.spill / "0.bin").write_bytes(b"x")
    again = opened_folder(tmp_path / "u", resume=True)
    assert not again.has(["a"]) and not partial.exists() and not list(again.spill.iterdir())


def test_a_full_disk_leaves_what_was_kept(tmp_path, monkeypatch):
    folder = opened_folder(tmp_path / "u")
    folder.add(["a"], solved_sites(["int8"]))

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(module, "write_shard", full)
        folder.add(["b"], solved_sites(["int8"]))
    again = opened_folder(tmp_path / "u", resume=True)
    assert again.has(["a"]) and not again.has(["b"])
    assert [file.suffix for file in (tmp_path / "u" / "sites").iterdir()] == [".safetensors"]


def test_large_parts_stay_in_their_file_until_they_are_needed(tmp_path):
    form = Format.parse("int8")
    weight = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    solved = SolvedSites([quantize_tensor(weight, form).stored_parts])
    folder = opened_folder(tmp_path / "u")
    folder.add(["a"], solved)
    found = folder.find(["a"])
    assert isinstance(found.parts[0][0], StoredTensor) and type(found.parts[0][1]) is torch.Tensor
    assert_same(found, solved)
    flip_first(folder._file(["a"]))
    with pytest.raises(CheckpointError, match=r"is damaged \(\['0.codes'\]\). Fix: remove it, and resume"):
        folder.find(["a"])


def flip_first(file):
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    first = json.loads(data[8 : 8 + length])["0.codes"]["data_offsets"][0]
    data[8 + length + first + 5] ^= 1
    file.write_bytes(bytes(data))


def test_ranks_have_one_folder_and_spill_apart(tmp_path, monkeypatch):
    group = Together(2)
    monkeypatch.setattr(ranks_module, "dist", group)
    opened_folder(tmp_path / "u").add(["a"], solved_sites(["int8"]))

    def work(ranks):
        folder = FinishedFolder(tmp_path / "u", RUN, resume=True, ranks=ranks)
        if ranks.rank == 1:
            folder.add(["b"], solved_sites(["fp8"]))
        ranks.wait()
        return folder.has(["a"]), folder.has(["b"]), folder.spill, folder.find(["b"])

    (a0, b0, spill0, found), (a1, b1, spill1, _) = group.run(work)
    assert (a0, b0, a1, b1) == (True, False, True, False), "all ranks see the same earlier run"
    assert spill0 != spill1 and spill0.is_dir() and spill1.is_dir()
    assert_same(found, solved_sites(["fp8"]))
    assert json.loads((tmp_path / "u" / LOG).read_text().splitlines()[-1])["rank"] == 1


def test_ranks_of_different_runs_are_refused(tmp_path, monkeypatch):
    group = Together(2)
    monkeypatch.setattr(ranks_module, "dist", group)

    def work(ranks):
        return FinishedFolder(tmp_path / "u", {**RUN, "batches": str(ranks.rank)}, resume=False, ranks=ranks)

    found = group.run(work)
    assert [type(error) for error in found] == [RanksError] * 2 and "rank 1 '1'" in str(found[0])
    assert not (tmp_path / "u").exists()
