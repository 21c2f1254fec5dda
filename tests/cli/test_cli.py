"""`main`: a user's error, and a warning of ours, are one line; `--help` names every command."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from qcompile import cli


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["eval", "no/such/model"], "could not be loaded"),
        (["quantize", "embedded", "."], "not empty"),
        (["recipes", "int9"], "unknown recipe 'int9'"),
        (["tune", "embedded", "--max-loss", "one"], "write a share"),
        (["sensitivity", "embedded", "--formats", "int9"], "format dtype 'int9' is unknown"),
        (["advise", "embedded", "--device", "tpu"], "device 'tpu' is unknown"),
        (["generate", ".", "--prompt", "x"], "could not be loaded"),
        (["quantize", "embedded", "out", "--dtype", "int8"], "use float32 or bfloat16"),
    ],
)
def test_errors_are_one_line_and_code_two(arguments, words, fail):
    assert words in fail(*arguments)


def test_an_error_is_printed_as_it_is_and_on_one_line(monkeypatch, fail):
    def broken():
        raise ValueError("logits [B, 1, V] of\n  " + "a long text " * 20)

    monkeypatch.setattr(cli, "app", broken)
    assert fail() == "error: logits [B, 1, V] of " + ("a long text " * 20).strip()


def test_an_interruption_has_the_code_of_a_shell(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_every_command_is_in_the_help(call):
    out = call("--help")
    for name in ("recipes", "explain", "verify", "advise", "quantize", "export-onnx", "eval", "compare", "tune",
                 "sensitivity", "bench", "generate", "chat", "kernels", "demo"):  # fmt: skip
        assert name in out


def test_help_imports_no_slow_package():
    """What the functions' own imports are for."""
    script = (
        "import sys, qcompile.cli; print([m for m in ('transformers', 'onnxruntime', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_pipe_gets_results_only(folder):
    """Progress bars and spinners are no part of what a command prints."""
    command = [sys.executable, "-m", "qcompile.cli", "eval", folder, "--windows", "1", "--length", "32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("perplexity ") and done.stdout.count("\n") == 1, done
