"""The main job in one command: a real LLM rewritten, quantized, compiled, exported and measured."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qcompile.api.export_onnx import export_onnx
from qcompile.api.quantize import quantize
from qcompile.api.verify_model import verify_model
from qcompile.calibration.text import embedded_text, windows
from qcompile.evaluation.perplexity import perplexity
from qcompile.evaluation.throughput import ModelSpeed, SpeedComparison, compare_with_inductor
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.recipe.report import Report

RECIPES = ("int8", "w4a16", "w4a8")
TIMED = ("int8", "w4a8")  # beside Inductor in bfloat16; each compilation takes minutes on two cores
PROMPT = "The capital of France is"


def run(out: Path, console: Console, *, quick: bool = False) -> dict[str, Any]:
    """Run the demo and write a plot, a JSON and an ONNX folder under `out`.

    Args:
        out: created; an earlier demo's files in it are replaced. console: where to print.
        quick: fewer tokens and rounds.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - started:5.0f} s[/] {text}", highlight=False)

    say("loading SmolLM2-135M")
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, embedded_text(), length=512 if quick else 1024, count=1 if quick else 2)
    losses: dict[str, float] = {"float32": perplexity(model, pieces)}
    say(f"float32: perplexity {losses['float32']:.2f} on the embedded text")
    half = copy.deepcopy(model).to(torch.bfloat16)
    losses["bfloat16"] = perplexity(half, pieces)
    say(f"bfloat16: perplexity {losses['bfloat16']:.2f}")
    reports: dict[str, Report] = {}
    for name in RECIPES:
        quantized = copy.deepcopy(model)
        reports[name] = quantize(quantized, name, progress=False)
        losses[name] = perplexity(quantized, pieces)
        say(
            f"{name}: perplexity {losses[name]:.2f}, site weights {reports[name].bytes_after / 1e6:.0f} MB, "
            f"quantized in {reports[name].seconds:.1f} s"
        )
        if name == "w4a16":
            exported = quantized
    proof = verify_model(model, {"input_ids": pieces[0][:, :64]})
    for certificate in proof.certificates:
        say(f"certificate: {certificate}")
    folder = out / "onnx"
    shutil.rmtree(folder, ignore_errors=True)
    say("exporting w4a16 to ONNX")
    onnx = export_onnx(exported, folder, tokenizer=tokenizer, progress=False)
    samples = _samples(exported, tokenizer, folder)
    say(f"ONNX Runtime agrees with PyTorch to {onnx.numbers['onnx relative error']:.1e}")
    say(f"compiling and timing: Inductor and qcompile ({', '.join(TIMED)}) in turn, a minute or more for each")
    speeds = compare_with_inductor(
        half,
        list(TIMED),
        prompt=128 if quick else 512,
        new=8 if quick else 16,
        rounds=2 if quick else 3,
    )
    table = _table(losses, reports, speeds)
    console.print()
    console.print(table)
    for certificate in proof.certificates:
        console.print(f"  law {certificate}", highlight=False)
    for who, text in samples.items():
        console.print(f"  [bold]{who}[/]: {text!r}", highlight=False)
    result = {"versions": versions(), "perplexity": losses, "speed": speeds.to_json()["rows"], "samples": samples}
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    _plot(losses, speeds, out / "tradeoff.png")
    say(f"plot: {out / 'tradeoff.png'}; numbers: {out / 'demo.json'}; ONNX folder: {folder}")
    return result


def _samples(model: Any, tokenizer: Any, folder: Path) -> dict[str, str]:
    from qcompile.generation.onnx_session import Session

    ids = tokenizer(PROMPT, return_tensors="pt")
    ours = model.generate(**ids, max_new_tokens=24, do_sample=False)[0]
    length = ids.input_ids.shape[1]
    theirs = list(Session(folder).stream(ids.input_ids, ours.shape[0] - length))
    return {
        "PyTorch w4a16": PROMPT + tokenizer.decode(ours[length:], skip_special_tokens=True),
        "ONNX w4a16": PROMPT + tokenizer.decode(theirs, skip_special_tokens=True),
    }


def _speed(name: str, speeds: SpeedComparison) -> ModelSpeed | None:
    """What was timed under the name that the table has for it."""
    return speeds.speeds.get("inductor bfloat16" if name == "bfloat16" else f"qcompile {name} bfloat16")


def _table(losses: dict[str, float], reports: dict[str, Report], speeds: SpeedComparison) -> Table:
    table = Table(
        "model", "perplexity", "site weights MB", "prefill tok/s", "decode tok/s", title="SmolLM2-135M on this machine"
    )
    sites = next(iter(reports.values())).sites
    for name, loss in losses.items():
        width = {"float32": 4, "bfloat16": 2}.get(name, 0)
        size = reports[name].bytes_after if name in reports else sum(s.N * s.K * width for s in sites)
        speed = _speed(name, speeds)
        rates = (f"{speed.prefill_rate:.0f}", f"{speed.decode_rate:.1f}") if speed else ("not timed", "not timed")
        table.add_row(
            f"{name} (Inductor)" if width else f"{name} (qcompile)", f"{loss:.2f}", f"{size / 1e6:.0f}", *rates
        )
    return table


def _plot(losses: dict[str, float], speeds: SpeedComparison, path: Path) -> None:
    """Perplexity against tokens per second; silent without matplotlib is not allowed: it says so."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        path.with_suffix(".txt").write_text("the plot needs: pip install 'torch-qcompile[plot]'\n")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, kind in zip(axes, ("decode", "prefill"), strict=True):
        for name, loss in losses.items():
            speed = _speed(name, speeds)
            if speed is None:
                continue
            rate = speed.decode_rate if kind == "decode" else speed.prefill_rate
            peer = name == "bfloat16"
            axis.scatter(rate, loss, s=60, marker="s" if peer else "o", color="0.5" if peer else "C0")
            axis.annotate(name, (rate, loss), textcoords="offset points", xytext=(6, 4), fontsize=9)
        axis.set_xlabel(f"{kind}, tokens/s (more is better)")
        axis.grid(alpha=0.3)
        axis.margins(x=0.2, y=0.15)
    axes[0].set_ylabel("perplexity (less is better)")
    figure.suptitle("SmolLM2-135M: the square is Inductor, circles are qcompile")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
