"""Graphs before and after every pass, as text files and diffs."""

from __future__ import annotations

import difflib
import functools

import pytest
import torch
from torch import nn
from zoo import build, example

import qcompile
from qcompile.ir.capture import capture
from qcompile.passes import FoldNorm, Fuse, Quantize, Untie
from qcompile.pipeline.dump import GraphDump, graph_lines
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe

RECIPE = Recipe("x", (Untie(), FoldNorm(), Quantize(), Fuse()))
FILES = [
    "00-captured.txt",
    "01-untie.diff", "01-untie.txt",
    "02-foldnorm.diff", "02-foldnorm.txt",
    "03-quantize.diff", "03-quantize.txt",
    "04-fuse.diff", "04-fuse.txt",
]  # fmt: skip


@functools.cache  # nothing here changes it
def captured():
    return capture(build("llama"), (), example("llama"))


def test_a_line_for_every_node():
    program = capture(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), (torch.randn(3, 8),), dynamic=False)
    weight, bias, x, linear, relu, output = graph_lines(program)
    assert weight.endswith(": float32[6, 8] = weight 0.weight") and bias.endswith("float32[6] = weight 0.bias")
    assert x == "input_1: float32[3, 8] = input" or x.endswith(": float32[3, 8] = input")
    assert linear.startswith("linear: float32[3, 6] = aten.linear.default(") and "relu: float32[3, 6] =" in relu
    assert output == "return ((relu,),)" or output.startswith("return (")


def test_operators_with_several_results_and_python_functions():
    class Split(nn.Module):
        def forward(self, x):
            return x.split(2, -1)[1] * x.shape[0]

    lines = graph_lines(capture(Split(), (torch.randn(3, 4),)))
    assert any("split: (float32[" in line and "aten.split.Tensor" in line for line in lines)
    assert any("= getitem(split, 1)" in line for line in lines)
    assert any("SymInt" in line for line in lines)


def test_files_of_a_run(tmp_path):
    program = captured()
    rewritten, _ = run(program, RECIPE, dump=tmp_path / "graphs" / "here")
    folder = tmp_path / "graphs" / "here"
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert (folder / "00-captured.txt").read_text().splitlines() == graph_lines(program)
    assert (folder / "04-fuse.txt").read_text().splitlines() == graph_lines(rewritten)


def test_diffs_say_what_a_pass_changed(tmp_path):
    run(captured(), RECIPE, dump=tmp_path)
    before = (tmp_path / "02-foldnorm.txt").read_text().splitlines()
    after = (tmp_path / "03-quantize.txt").read_text().splitlines()
    found = (tmp_path / "03-quantize.diff").read_text().splitlines()
    assert found == list(difflib.unified_diff(before, after, "before", "after Quantize", lineterm="", n=2))
    added = [line for line in found if line.startswith("+") and "qcompile.quantize" in line]
    assert len(added) == sum("qcompile.quantize" in line for line in after) > 0
    removed = [line for line in (tmp_path / "04-fuse.diff").read_text().splitlines() if line.startswith("-")]
    assert any("qcompile.dequantize" in line for line in removed)


def test_a_pass_that_changes_nothing_has_an_empty_diff(tmp_path):
    program = captured()
    dump = GraphDump(tmp_path, program)
    dump.write("Nothing", program)
    assert (tmp_path / "01-nothing.diff").read_text() == ""
    assert (tmp_path / "01-nothing.txt").read_text() == (tmp_path / "00-captured.txt").read_text()


def test_an_undone_pass_is_in_the_dump(tmp_path, monkeypatch):
    """The dump is for finding out what it did."""
    from qcompile.pipeline import run as module
    from qcompile.recipe.report import Certificate

    monkeypatch.setattr(module, "certify", lambda name, *a, **k: (Certificate(name, 1.0, 1e-3, "float32", "add"), ()))
    inputs = list(example("llama").values())
    with pytest.warns(UserWarning, match="pass undone"):
        _, report = run(captured(), Recipe("x", (Untie(), FoldNorm(open_streams=True))), example=inputs, dump=tmp_path)
    assert not report.passes and (tmp_path / "02-foldnorm.diff").read_text()


@pytest.mark.parametrize("door", ["quantize", pytest.param("compile", marks=pytest.mark.slow)])
def test_users_ask_for_it(door, tmp_path):
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64)).eval().requires_grad_(False)
    x = torch.randn(6, 48)
    if door == "quantize":
        qcompile.quantize(model, "int8", example=x, progress=False, dump=tmp_path)
    else:
        with torch.no_grad():
            torch.compile(model, backend="qcompile", options={"dump": str(tmp_path), "on_slow_kernel": "quantize"})(x)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00-captured.txt", "01-quantize.diff", "01-quantize.txt", "02-fuse.diff", "02-fuse.txt",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run(captured(), RECIPE, dump=tmp_path / "file" / "graphs")
