"""A folder is written whole or not at all, by one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import qcompile
import qcompile.codegen.onnx.export_module as exporting
import qcompile.codegen.onnx.variants as variants
from qcompile.api import export_onnx
from qcompile.checkpoint.atomic_folder import CheckpointError, WriteError, atomic_folder, require_empty


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def test_the_second_of_two_exports_is_refused_before_it_works(tmp_path, monkeypatch):
    example = torch.randn(2, 32)
    entered, go_on, failed = threading.Event(), threading.Event(), []
    real = exporting.export_module

    def slow(*args, **kwargs):
        entered.set()
        go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(exporting, "export_module", slow)

    def first():
        try:
            qcompile.export_onnx(model(), tmp_path / "m", example=example, progress=False)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert entered.wait(60)
        with monkeypatch.context() as patch:
            patch.setattr(export_onnx, "quantize", None)
            with pytest.raises(CheckpointError, match="being written by another run"):
                qcompile.export_onnx(model(), tmp_path / "m", "int8", example=example, progress=False)
    finally:
        go_on.set()
        thread.join()
    assert not failed and (tmp_path / "m/model.onnx").is_file() and os.listdir(tmp_path) == ["m"]


def test_what_came_to_lie_there_meanwhile_stays(tmp_path):
    with pytest.raises(CheckpointError, match="not empty any more"), atomic_folder(tmp_path / "m") as work:
        (work / "ours").write_text("x")
        (tmp_path / "m").mkdir()
        (tmp_path / "m/theirs").write_text("x")
    assert os.listdir(tmp_path) == ["m"] and os.listdir(tmp_path / "m") == ["theirs"]


@pytest.mark.parametrize(
    ("place", "step"),
    [
        (exporting, "export_module"),
        pytest.param(exporting, "expected_outputs", marks=pytest.mark.slow),
        pytest.param(variants, "verify", marks=pytest.mark.slow),
        pytest.param(variants, "lower_by_tokens", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_export_leaves_nothing(place, step, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    from zoo import build, example

    llm = build("llama")
    qcompile.quantize(llm, "int4-cpu", [example("llama")], progress=False)
    monkeypatch.setattr(place, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        qcompile.export_onnx(llm, tmp_path / "m", progress=False)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_killed_run_leaves_no_folder_and_no_lock(tmp_path):
    script = (
        "import sys, time\nfrom qcompile.checkpoint.atomic_folder import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as work:\n"
        "    (work / 'half').write_text('x'); print('writing', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "m")], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    with pytest.raises(CheckpointError, match="another run"), atomic_folder(tmp_path / "m"):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "m").exists()
    with atomic_folder(tmp_path / "m") as work:
        (work / "whole").write_text("x")
    assert os.listdir(tmp_path / "m") == ["whole"]


def test_the_current_folder_is_refused_and_a_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", str(tmp_path / "here")):
        with pytest.raises(CheckpointError, match="name a folder inside it"), atomic_folder(name):
            raise AssertionError("no work before that")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as work:
        (work / "file").write_text("whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link", "real"]


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (("file/m", "file is a file|cannot be written"), ("loop", "leads to itself|cannot be written")):
        with pytest.raises(CheckpointError, match=words):
            require_empty(tmp_path / name)
    with pytest.raises(WriteError, match="cannot be written .*too long"):
        require_empty(tmp_path / ("x" * 300))
    with pytest.raises(WriteError, match=r"needs 1000000000000 MB, and .* MB free. Fix: free some space"):
        require_empty(tmp_path / "m", 10**18)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(WriteError, match="cannot be written .*No space left on device.*Fix: free some space"):
        require_empty(tmp_path / "new" / "m")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_nothing(error, tmp_path):
    with pytest.raises(WriteError, match="m cannot be written .*No space left") as caught:
        with atomic_folder(tmp_path / "new" / "deep" / "m"):
            raise error
    assert "\n" not in str(caught.value) and isinstance(caught.value, OSError) and not os.listdir(tmp_path)


def test_other_errors_of_the_block_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "m"):
        (tmp_path / "text").read_text()
