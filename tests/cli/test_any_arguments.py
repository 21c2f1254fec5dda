"""Any arguments at all: each command ends with a result or one line, and names with brackets come out whole."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import warnings
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import build

from qcompile import cli
from qcompile.api import export_onnx, quantize, verify_model
from qcompile.calibration import text
from qcompile.checkpoint import save_load
from qcompile.cli import arguments, demo
from qcompile.codegen.triton.aot import budget
from qcompile.evaluation import compare, perplexity, sensitivity, throughput
from qcompile.evaluation.compare import Comparison, RecipeResult
from qcompile.evaluation.throughput import ModelSpeed, SpeedComparison
from qcompile.generation import pretrained, sampling
from qcompile.recipe.report import Report

NAMES = ["[/tmp]", "[q4_k]", "[red]", "[bold]x[/bold]", "[", "a]b[c"]
REACHED = "the model would be loaded now"
ROOT = typer.main.get_command(arguments.app)
COMMANDS = {(name,): command for name, command in ROOT.commands.items() if name != "kernels"}
COMMANDS |= {("kernels", name): command for name, command in ROOT.commands["kernels"].commands.items()}


def run(*words):
    """Exit code, what stdout has, and the lines on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["qcompile", *map(str, words)])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code, out.getvalue(), err.getvalue().splitlines()


@pytest.fixture
def nothing_is_loaded(monkeypatch, tmp_path):
    """Commands end where they would load a model; the folder is empty."""

    def reached(*_, **__):
        raise ValueError(REACHED)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_pretrained", reached)
    monkeypatch.setattr(pretrained, "load_encoder", reached)
    monkeypatch.setattr(demo, "run", reached)
    monkeypatch.setattr(budget, "check", lambda architectures, only: [])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


WORDS = st.one_of(
    st.sampled_from(["0", "-1", "nan", "inf", "-inf", "1e400", "", " ", "9" * 30, "-0", "1_0", "٣", "0x1", "None"]),
    st.sampled_from([*NAMES, ".", "..", "/", "/proc/x", "no/such", "a\0b", "x" * 300, "c.png", "-", "--", "é\ud800"]),
    st.sampled_from(["int8", "w4a16-gptq", "auto", "bfloat16", "int8,,", "1x1", "0x0", "1x", "embedded", "90", "2"]),
    st.text(max_size=8),
)


@settings(max_examples=40)
@given(data=st.data())
def test_any_arguments_end_in_one_line(data, nothing_is_loaded):
    words = list(data.draw(st.sampled_from(sorted(COMMANDS))))
    for param in COMMANDS[tuple(words)].params:
        if param.name in ("help", "update") or data.draw(st.booleans()) and param.param_type_name == "option":
            continue
        if param.param_type_name == "argument":
            words.append(data.draw(WORDS))
        elif getattr(param, "is_flag", False):
            words.append(data.draw(st.sampled_from(param.opts)))
        else:
            words += [param.opts[0], data.draw(WORDS)]
    if words[0] == "demo" and "--out" not in words:
        return
    code, _, lines = run(*words)
    errors = [line for line in lines if line.startswith("error: ")]
    assert code in (0, 1, 2) and not any("Traceback" in line for line in lines), (words, lines)
    assert len(errors) == (code == 2), (words, lines)


BAD = {int: ["0", "-1", "9" * 30, "nan", "1.5", ""], float: ["-1", "nan", "inf", "-inf", ""]}
FREE = {"seed": ["0", "9" * 30], "chunk": ["9" * 30]}  # what such an option allows


def refusals():
    """Every numeric and path option of every command, with each bad value."""
    for words, command in COMMANDS.items():
        hints = get_type_hints(command.callback)
        for param in command.params:
            if param.param_type_name != "option" or getattr(param, "is_flag", False):
                continue
            kind = str(hints[param.name])
            if "int" in kind or "float" in kind:
                values = [v for v in BAD[int if "int" in kind else float] if v not in FREE.get(param.name, ())]
            elif param.name in ("text", "calibration", "data", "out", "dump"):
                values = ["", " ", "x" * 300]
            else:
                continue
            yield from ((*words, param.opts[0], value) for value in values)


def test_every_bad_number_and_path_is_refused_before_the_model_is_loaded(nothing_is_loaded, tmp_path):
    cases, places = list(refusals()), {"quantize": ["."], "export-onnx": ["."]}
    assert len(cases) > 120
    for *words, option, value in cases:
        needed = [] if words[0] in ("kernels", "demo") else ["embedded"]
        needed += ["new"] if words[0] in places else []
        needed += ["--prompt", "x"] if words[0] == "generate" else []
        code, _, lines = run(*words, *needed, option, value)
        assert code == 2 and lines[-1].startswith("error: ") and REACHED not in lines[-1], (words, option, value, lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_brackets_in_names_come_out_whole(name, nothing_is_loaded, tmp_path):
    """As a model, a recipe, a text, a file and a folder, in what every command refuses."""
    for words, command in COMMANDS.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        if arguments and words[0] != "kernels" and not (tmp_path / name).exists():
            rest = ["new.pt2" if words == ("package",) else "new"] if len(arguments) > 1 else []
            rest += ["--prompt", "x"] if words[0] == "generate" else []
            code, _, lines = run(*words, f"/no/{name}", *rest)
            assert code == 2 and (name in lines[-1] or REACHED in lines[-1]), (words, lines)
    for option in ("--text", "--recipe", "--dtype"):
        code, _, lines = run("eval", "embedded", option, name)
        assert code == 2 and name in lines[-1], lines
    (tmp_path / name.replace("/", "")).mkdir()
    code, _, lines = run("tune", "embedded", "--out", name.replace("/", ""))
    assert code == 2 and name.replace("/", "") in lines[-1], lines


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES[:3])
def test_brackets_in_results_come_out_whole(name, terminal, screen, monkeypatch, tmp_path):
    """In tables, spinners and lines of commands whose work is a stub."""
    screen(300, terminal)
    model = build("llama")
    tokenizer = SimpleNamespace(chat_template=None)
    row = RecipeResult(name, 10.0, 0.0, 1.0, 5, 1.0)
    speeds = {key: ModelSpeed(key, 4, [1.0], [1.0]) for key in ("inductor float32", name)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(text, "windows", lambda *_, **__: [torch.zeros(1, 4, dtype=torch.int64)])
    monkeypatch.setattr(text, "batches", lambda *_, **__: [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}])
    monkeypatch.setattr(quantize, "quantize", lambda *_, **__: Report(name))
    monkeypatch.setattr(export_onnx, "export_onnx", lambda *_, **__: Report(name))
    monkeypatch.setattr(verify_model, "verify_model", lambda *_, **__: Report(name))
    monkeypatch.setattr(save_load, "save", lambda *_, **__: None)
    monkeypatch.setattr(perplexity, "perplexity", lambda *_, **__: 3.0)
    monkeypatch.setattr(compare, "compare", lambda *_, **__: [row])
    monkeypatch.setattr(Comparison, "_measure", lambda self, recipe_name, recipe: dataclasses.replace(row, recipe=name))
    monkeypatch.setattr(
        throughput, "compare_with_inductor", lambda *_, **__: SpeedComparison(speeds, dict.fromkeys(speeds, 1))
    )
    monkeypatch.setattr(
        sensitivity,
        "sensitivity",
        lambda *_, **__: [sensitivity.Damage(name, sensitivity.SiteFormats.parse("int8"), 4, 0.1)],
    )
    monkeypatch.setattr(sampling, "stream", lambda *_, **__: iter(()))
    few = ["--windows", 1, "--length", 4]
    safe = name.replace("/", "-")
    for words, shown in [
        (["compare", safe, "--recipes", "int8", *few], name),
        (["tune", safe, "--recipes", "int8", *few, "--out", f"{safe}.json"], safe),
        (["bench", safe], name),
        (["sensitivity", safe, "--out", f"{safe}.json"], name),
        (["quantize", safe, f"{safe} new"], f"written: {safe} new"),
        (["export-onnx", safe, f"{safe} new", "-r", "int8"], f"written: {safe} new"),
        (["verify", safe], "no exact pass"),
    ]:
        code, out, lines = run(*words)
        assert code == 0 and shown in " ".join(out.split()), (words, code, out, lines)


def test_the_kernels_of_a_name_with_brackets(nothing_is_loaded):
    for name in NAMES:
        code, _, lines = run("kernels", "show", name)
        assert code == 2 and name in lines[-1]
