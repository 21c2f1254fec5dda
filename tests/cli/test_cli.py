"""`main`: a user's error, and a warning of ours, are one line; `--help` names every command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qcompile import cli


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["eval", "no/such/model"], "no/such/model is not found: there is no such file or folder"),
        (["eval", "/models/[/tmp]"], "/models/[/tmp] is not found"),
        (["explain", "/models/Llama [q4_k] v2"], "/models/Llama [q4_k] v2 is not found"),
        (["explain", ""], "'MODEL': it is empty"),
        (["explain"], "Missing argument"),
        (["explode"], "No such command 'explode'"),
        (["quantize", "embedded", "."], "not empty"),
        (["quantize", "embedded", ""], "the path is empty"),
        (["quantize", "embedded", "out", "-r", "int9"], "unknown recipe 'int9'"),
        (["recipes", "int9"], "unknown recipe 'int9'"),
        (["recipes", "[red].json"], "[red].json"),
        (["tune", "embedded", "--max-loss", "one"], "write a share"),
        (["tune", "embedded", "--max-loss", "nan"], "above 0 and below 10"),
        (["tune", "embedded", "--out", "c.png"], "where the plot goes"),
        (["sensitivity", "embedded", "--formats", "int9"], "format dtype 'int9' is unknown"),
        (["sensitivity", "embedded", "--bits", "nan"], "'--bits'"),
        (["advise", "embedded", "--device", "tpu"], "device 'tpu' is unknown"),
        (["advise", "embedded", "--serving", "[red]"], "got '[red]'"),
        (["generate", ".", "--prompt", "x"], "could not be loaded"),
        (["generate", ".", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0: it is 0 (greedy)"),
        (["generate", ".", "--prompt", ""], "'--prompt': it is empty"),
        (["bench", "--rounds", "0"], "'--rounds'"),
        (["verify", ".", "--length", "0"], "'--length'"),
        (["eval", ".", "--windows", "-1"], "'--windows'"),
        (["eval", ".", "--windows", "many"], "'--windows'"),
        (["eval", ".", "--text", "no.txt"], "no.txt is not found"),
        (["eval", ".", "--nonsense"], "No such option"),
        (["quantize", "embedded", "out", "--dtype", "int8"], "use float32 or bfloat16"),
    ],
)
def test_errors_are_one_line_and_code_two(arguments, words, fail):
    assert words in fail(*arguments)


def test_an_error_is_printed_as_it_is_and_on_one_line(monkeypatch, fail):
    def broken(**_):
        raise ValueError("logits [B, 1, V] of\n  " + "a long text " * 20)

    monkeypatch.setattr(cli, "app", broken)
    assert fail() == "error: logits [B, 1, V] of " + ("a long text " * 20).strip()


@pytest.mark.parametrize(
    "error,words",
    [
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), "No module named 'onnx'. Fix: pip install onnx"),
        (MemoryError("8 GB"), "out of memory: 8 GB"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried .."), "out of memory: DefaultCPUAllocator"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, words, monkeypatch, fail):
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(error))
    assert words in fail()


def test_a_fault_of_ours_is_a_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: {}["key"])
    with pytest.raises(KeyError):
        cli._code()


def test_the_version(call):
    from qcompile import __version__

    assert call("--version") == f"qcompile {__version__}\n"


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


@pytest.mark.slow
def test_a_pipe_gets_results_only(folder):
    """Progress bars and spinners are no part of what a command prints."""
    command = [sys.executable, "-m", "qcompile.cli", "eval", folder, "--windows", "1", "--length", "32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("perplexity ") and done.stdout.count("\n") == 1, done
