"""What decides the result of a run is noted beside its output: a run that differs in any of it is another one."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from qcompile.api.workspace import Workspace
from qcompile.calibration.ranks import Ranks
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.passes import Quantize
from qcompile.recipe.recipe import Recipe

RECIPE = Recipe("mine", (Quantize(),))
BATCHES = [[torch.arange(4)], [torch.arange(6)]]


@pytest.fixture
def begin(tmp_path):
    """Begin a run over two files beside each other, some of it changed."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(b"12345678")

    def run(*, model=None, recipe=RECIPE, batches=BATCHES, resume=True):
        space = Workspace(tmp_path / "o.unfinished", files, resume, Ranks())
        return space.begin(model or nn.Linear(4, 4), recipe, batches)

    run.files = files
    return run


def test_a_run_is_described(begin, tmp_path):
    begin(resume=False)
    run = json.loads((tmp_path / "o.unfinished" / "run.json").read_text())
    assert json.loads(run["recipe"]) == RECIPE.to_json() and (run["dtype"], run["device"]) == ("torch.float32", "cpu")
    assert run["model"].startswith("Linear ") and "b.safetensors" in run["model"]
    assert run["batches"].startswith("2 of ") and torch.__version__ in run["versions"]


def test_the_same_run_goes_on(begin):
    begin(resume=False)
    begin(batches=[[tensor.clone() for tensor in batch] for batch in BATCHES])
    strided = torch.stack([torch.arange(4)] * 2, 1)[:, 0]
    begin(batches=[[strided], BATCHES[1]])


@pytest.mark.parametrize(
    "name, changed",
    [
        ("recipe", {"recipe": Recipe("mine", (Quantize(clip=True),))}),
        ("recipe", {"recipe": Recipe("other", (Quantize(),))}),
        ("model", {"model": nn.Bilinear(4, 4, 4)}),
        ("dtype", {"model": nn.Linear(4, 4).bfloat16()}),
        ("device", {"model": nn.Linear(4, 4, device="meta")}),
        ("batches", {"batches": BATCHES[:1]}),
        ("batches", {"batches": BATCHES[::-1]}),
        ("batches", {"batches": [[torch.arange(4)], [torch.arange(6) + 1]]}),
        ("batches", {"batches": [[torch.arange(4)], [torch.arange(6.0)]]}),
    ],
)
def test_another_run_is_refused(begin, name, changed):
    begin(resume=False)
    with pytest.raises(CheckpointError, match=f"is of another run: its {name} is "):
        begin(**changed)


def test_files_of_a_model_that_changed_are_refused(begin):
    begin(resume=False)
    file = begin.files[1]
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    with pytest.raises(CheckpointError, match="another run: its model is "):
        begin()
    file.write_bytes(b"123456789")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match="another run: its model is "):
        begin()
