"""The folder of a run that is not finished: every site that was solved, so that a killed run goes on from there.

    run.json                     what the run is: recipe, model, batches, versions
    sites/NAME-DIGEST.safetensors  the stored parts of sites that were solved together
    quantize.jsonl               a line for each of them: damage, seconds, memory
    run-RANK-of-COUNT.safetensors  values of that rank's batches, where the run stood a short time ago
    spill/                       weights and values that do not fit in memory; of no use to another run

A file appears whole or not at all: it is written under another name, synced and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.calibration.layerwise_run import LayerwiseRun, RunState
from qcompile.calibration.ranks import Ranks
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.stored_files import stored_tensors
from qcompile.checkpoint.tensor_file import digest, opened, write_shard
from qcompile.memory.process import peak_resident_bytes
from qcompile.numerics.qtensor import PARTS, StoredParts
from qcompile.recipe.solved_sites import SolvedSites
from qcompile.recipe.strict_json import DamagedJson, read_json

SUFFIX = ".unfinished"
LOG = "quantize.jsonl"
_RUN, _SITES, _SPILL = "run.json", "sites", "spill"


class FinishedFolder:
    """Keeps solved sites in a folder, which all ranks of a run see.

    Attributes:
        path: the folder.
        ranks: the processes that share the run.
    """

    seconds_between = 60.0
    """From one time that `keep_run` writes to the next, at least."""

    def __init__(self, path: Path, run: Mapping[str, str], *, resume: bool, ranks: Ranks) -> None:
        """Make the folder, or go on with what is there.

        Args:
            path: the folder.
            run: what decides the result, by name: recipe, model, batches, versions.
            resume: go on with the remains of an earlier run, where there are any.

        Raises:
            CheckpointError: there are remains and `resume` is off, or they are of another run: with what differs.
        """
        self.path, self.ranks = path, ranks
        ranks.require_equal(dict(run))
        if path.exists():
            self._check(run, resume)
        ranks.wait()
        if ranks.is_first:
            self._prepare(run)
        ranks.wait()
        self.spill.mkdir(parents=True, exist_ok=True)
        if not (path / _RUN).is_file():
            raise CheckpointError(f"rank {ranks.rank} does not see {path}. Fix: a folder that all ranks share")
        self._earlier = {file.name for file in (path / _SITES).glob("*.safetensors")}  # the same on all ranks
        self._start = self._kept_at = time.monotonic()
        self._keeping, self._restores = 0.0, bool(self._earlier)
        self._read: set[str] = set()  # groups of sites that the program has by now
        ranks.wait()

    @property
    def spill(self) -> Path:
        """Where this rank puts what does not fit in memory."""
        return self.path / _SPILL / str(self.ranks.rank)

    @property
    def earlier(self) -> int:
        """How many groups of sites an earlier run finished."""
        return len(self._earlier)

    def has(self, sites: Sequence[str]) -> bool:
        """Whether an earlier run kept something for these sites."""
        return self._file(sites).name in self._earlier

    def find(self, sites: Sequence[str]) -> SolvedSites:
        """What was kept for these sites.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        file = self._file(sites)
        with opened(file) as reader:
            notes = json.loads(reader.metadata()["notes"])
        tensors = stored_tensors([file])
        changed = [name for name, tensor in tensors.items() if digest(tensor) != notes["digests"].get(name)]
        if changed or notes["sites"] != list(sites):
            raise CheckpointError(f"{file} is damaged ({changed or notes['sites']}). Fix: remove it, and resume")
        self._read.add(file.name)
        return _solved(tensors, notes)

    def add(self, sites: Sequence[str], solved: SolvedSites) -> None:
        """Keep solved sites, and add a line on them to the log.

        Raises:
            OSError: the disk is full, or the folder cannot be written; what was kept before stays.
        """
        tensors = {
            f"{index}.{part}": tensor.cpu().contiguous()
            for index, parts in enumerate(solved.parts)
            for part, tensor in zip(PARTS, parts, strict=True)
            if tensor is not None
        }
        notes = {
            "sites": list(sites),
            "fell_back": solved.fell_back,
            "damage": solved.damage,
            "digests": {name: digest(tensor) for name, tensor in tensors.items()},
        }
        file = self._file(sites)
        partial = file.with_suffix(".partial")
        try:
            write_shard(tensors, partial, {"notes": json.dumps(notes)})
            _sync(partial)
        except OSError as error:
            partial.unlink(missing_ok=True)
            size, free = sum(t.nbytes for t in tensors.values()) / 1e6, shutil.disk_usage(self.path).free / 1e6
            reason = f"{error.strerror}: {size:.0f} MB of codes, {free:.0f} MB are free; what was finished before stays"
            raise OSError(error.errno, reason, str(self.path)) from error
        partial.replace(file)
        _sync(file.parent)
        line: dict[str, Any] = {
            "sites": list(sites),
            "damage": solved.damage,
            "fell_back": solved.fell_back,
            "rank": self.ranks.rank,
        }
        line |= {"seconds": round(time.monotonic() - self._start, 1), "resident_bytes": peak_resident_bytes()}
        with (self.path / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def keep_run(self, run: LayerwiseRun) -> None:
        """Write where a layerwise run stands, unless that was done a short time ago.

        It takes a twentieth of the time at most, and no more than the run's values on the disk.
        """
        now = time.monotonic()
        if now - self._kept_at < max(self.seconds_between, 20 * self._keeping):
            return
        state = run.state()
        if state is not None:
            tensors = {name: value.cpu().contiguous() for name, value in state.values.items()}
            notes = {
                "done": state.done,
                "sizes": state.sizes,
                "sites": sorted(self._read),
                "digests": {name: digest(value) for name, value in tensors.items()},
                "strides": {n: v.stride() for n, v in state.values.items()},
            }
            partial = self._run_file.with_suffix(".partial")
            write_shard(tensors, partial, {"notes": json.dumps(notes)})
            _sync(partial)
            partial.replace(self._run_file)
        self._kept_at = time.monotonic()
        self._keeping = self._kept_at - now

    def restore_run(self, run: LayerwiseRun) -> None:
        """Bring a run that has not begun to where an earlier one stood.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self._restores:
            return
        self._restores = False
        if not self._run_file.is_file():
            return
        with opened(self._run_file) as reader:
            notes = json.loads(reader.metadata()["notes"])
            if not self._read.issuperset(notes["sites"]):  # a file of an earlier site was removed: compute it again
                return
            tensors = {name: reader.get_tensor(name) for name in notes["strides"]}
        if any(digest(tensor) != notes["digests"][name] for name, tensor in tensors.items()):
            raise CheckpointError(f"{self._run_file} is damaged. Fix: remove it, and resume")
        tensors = {name: _with_strides(tensor, notes["strides"][name]) for name, tensor in tensors.items()}
        run.restore(RunState(notes["done"], tensors, notes["sizes"]))

    @property
    def _run_file(self) -> Path:
        return self.path / f"run-{self.ranks.rank}-of-{self.ranks.count}.safetensors"

    def _prepare(self, run: Mapping[str, str]) -> None:
        shutil.rmtree(self.path / _SPILL, ignore_errors=True)
        (self.path / _SITES).mkdir(parents=True, exist_ok=True)
        for partial in (self.path / _SITES).glob("*.partial"):
            partial.unlink()
        _write_whole(self.path / _RUN, json.dumps(dict(run), indent=1).encode())

    def _file(self, sites: Sequence[str]) -> Path:
        label = re.sub(r"[^\w.-]", "_", sites[0])[-80:]
        return self.path / _SITES / f"{label}-{zlib.crc32(' '.join(sites).encode()):08x}.safetensors"

    def _check(self, run: Mapping[str, str], resume: bool) -> None:
        path = self.path / _RUN
        if not path.is_file():
            raise CheckpointError(f"{self.path} exists and is of no run of ours. Fix: remove it")
        if not resume:
            raise CheckpointError(
                f"{self.path} holds what an earlier run finished. Fix: resume it (--resume), or remove that folder"
            )
        try:
            before: Any = read_json(path)
        except DamagedJson as error:
            raise CheckpointError(f"{error}. Fix: remove {self.path}, and run without resume") from error
        for name in [*run, *before]:
            if before.get(name) != run.get(name):
                raise CheckpointError(
                    f"{self.path} is of another run: its {name} is {_short(before.get(name))}, and this one's is "
                    f"{_short(run.get(name))}. Fix: run it as before, or remove that folder"
                )


def _solved(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> SolvedSites:
    parts: list[StoredParts] = []
    for index in range(len(notes["sites"])):
        codes, scale, zero, group_scale = (tensors.get(f"{index}.{part}") for part in PARTS)
        assert codes is not None and scale is not None
        parts.append((codes, scale, zero, group_scale))
    damage = notes["damage"]
    return SolvedSites(parts, list(notes["fell_back"]), None if damage is None else (damage[0], damage[1]))


def _with_strides(values: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy that lies in memory as the tensor did that was kept: sums may be of another order elsewhere."""
    if 0 in strides:  # expanded: a mask
        return values.clone()
    return torch.empty_strided(values.shape, tuple(strides), dtype=values.dtype).copy_(values)


def _short(value: object) -> str:
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:76]}..."


def _write_whole(file: Path, data: bytes) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(data)
    _sync(partial)
    partial.replace(file)


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
