"""The command `demo`: a real LLM rewritten, quantized, exported, compiled and measured, within a budget of time.

Each stage has a budget of seconds. A slow machine measures fewer windows and rounds, at least one of each. Compiling
takes most of the time: of the models to compile the int4 one comes first, and one that would end after the budget is
skipped and named; the eager models, which cost nothing to compile, are always there to compare with.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

from qcompile.cli.arguments import app
from qcompile.cli.interruption import kept
from qcompile.cli.output import print_table, tell, write_plot
from qcompile.cli.path_checks import work_folder
from qcompile.memory.atomic_file import write_whole

if TYPE_CHECKING:
    from qcompile.evaluation.throughput import ModelSpeed
    from qcompile.recipe.report import Report

INT4 = "w4a16-rotated-gptq"
RECIPES = ("int8", INT4)
EAGER = "bfloat16 (eager)"
STAGES = {"quality": 190.0, "export": 80.0, "speed": 200.0}  # seconds
PROMPT = "The capital of France is"
WINDOWS, ROUNDS = 2, 5  # at most; at least one of each is measured


class Budget:
    """Seconds for stages that follow one another; time that one stage saves belongs to the next.

    Args:
        stages: seconds by name, in order.
        clock: gives seconds.
    """

    def __init__(self, stages: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.stages, self._clock, self._start = dict(stages), clock, clock()
        self._deadline = self._start

    def begin(self, stage: str) -> str:
        """Begin a stage; returns a line that says how long it may take."""
        names = list(self.stages)
        planned = sum(self.stages[name] for name in names[: names.index(stage) + 1])
        self._deadline = self._start + planned
        return f"stage {stage}: until {planned:.0f} s"

    @property
    def elapsed(self) -> float:
        """Seconds since the first stage began."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds until the stage should end; negative once it is late."""
        return self._deadline - self._clock()

    def affords(self, seconds: float) -> bool:
        """Whether work of this many seconds ends within the stage."""
        return seconds <= self.left

    def how_many(self, most: int, seconds: float, share: float = 1.0) -> int:
        """How many pieces of work of so many seconds each fit into a share of what is left: 1 to `most`."""
        return max(1, min(most, int(share * self.left / max(seconds, 1e-9))))


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option(help="folder for the plot, the JSON and the ONNX folder", parser=work_folder, metavar="FOLDER"),
    ] = Path("demo-out"),
    quick: Annotated[bool, typer.Option(help="shorter texts, half the time")] = False,
) -> None:
    """Rewrite, quantize, export, compile and measure the embedded LLM; ends in one screen and a plot."""
    budget = Budget({name: seconds / (2 if quick else 1) for name, seconds in STAGES.items()})
    with kept(lambda: f"what was written is in {out}" if out.exists() else "nothing was written"):
        run(out, budget, quick=quick)


def run(out: Path, budget: Budget, *, quick: bool = False) -> dict[str, Any]:
    """Run the demo and write a plot, a JSON and an ONNX folder.

    Args:
        out: created; an earlier demo's files in it are replaced.
        budget: of the stages `STAGES`.
        quick: shorter texts.

    Raises:
        ValueError: there is a folder `onnx` of another kind, before any work.
    """
    from qcompile.memory.environment import versions

    def say(text: str) -> None:
        tell(f"{budget.elapsed:5.0f} s  {text}")

    _check_replaceable(out / "onnx")
    out.mkdir(parents=True, exist_ok=True)
    say(budget.begin("quality"))
    floats, tokenizer, quantized, losses, reports = _quality(budget, say, 512 if quick else 1024)
    say(budget.begin("export"))
    samples = _export(quantized, tokenizer, out / "onnx", say)
    say(budget.begin("speed"))
    speeds = _speed(floats, quantized, budget, say, 128 if quick else 512)
    print_table(_table(losses, reports, speeds))
    for runtime, text in samples.items():
        tell(f"{runtime}: {text!r}")
    result = {
        "versions": versions(),
        "seconds": budget.elapsed,
        "perplexity": losses,
        "tokens_per_second": {n: {"prefill": s.prefill_rate, "decode": s.decode_rate} for n, s in speeds.items()},
        "rounds": {name: len(s.prefill) for name, s in speeds.items()},
        "samples": samples,
    }
    write_whole(out / "demo.json", json.dumps(result, indent=1) + "\n")
    tell(f"written: {out / 'demo.json'}, {out / 'onnx'}")
    write_plot(lambda path: _plot(losses, speeds, path), out / "tradeoff.png")
    say(f"done; the budget was {sum(budget.stages.values()):.0f} s")
    return result


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that no export wrote."""
    ours = not folder.is_symlink() and (folder / "model.onnx").is_file() and (folder / "qcompile.json").is_file()
    empty = not folder.is_symlink() and folder.is_dir() and not any(folder.iterdir())
    if (folder.exists() or folder.is_symlink()) and not ours and not empty:
        raise ValueError(f"{folder} is not of an earlier demo and would be replaced. Fix: choose another --out")


def _quality(
    budget: Budget, say: Callable[[str], None], length: int
) -> tuple[Any, Any, Any, dict[str, float], dict[str, Report]]:
    """The float models by dtype, their tokenizer, the int4 model, and perplexities and reports by name."""
    from qcompile.api.quantize import quantize
    from qcompile.api.verify_model import verify_model
    from qcompile.calibration.text import batches, embedded_text, windows
    from qcompile.evaluation.perplexity import perplexity
    from qcompile.generation.pretrained import load_pretrained
    from qcompile.pipeline.find_recipe import find_recipe

    model, tokenizer = load_pretrained()
    say("loaded SmolLM2-135M")
    pieces = windows(tokenizer, embedded_text(), length=length, count=WINDOWS)
    half = copy.deepcopy(model).to(torch.bfloat16)
    before = budget.elapsed
    first = perplexity(half, pieces[:1], progress=False)  # the slowest where a processor has no bfloat16 products
    seconds = (2 + len(RECIPES)) * (budget.elapsed - before)
    pieces = pieces[: budget.how_many(WINDOWS, seconds, share=0.3)]  # most of the stage is for quantizing
    losses = {"float32": perplexity(model, pieces, progress=False)}
    say(f"float32: perplexity {losses['float32']:.2f} ({len(pieces)} windows of {length} tokens)")
    losses["bfloat16"] = first if len(pieces) == 1 else perplexity(half, pieces, progress=False)
    say(f"bfloat16: perplexity {losses['bfloat16']:.2f}")
    reports, quantized = {}, model
    for name in RECIPES:
        quantized = copy.deepcopy(model)
        data = batches(tokenizer) if find_recipe(name).needs else None
        reports[name] = quantize(quantized, name, data, progress=False)
        losses[name] = perplexity(quantized, pieces, progress=False)
        say(f"{name}: perplexity {losses[name]:.2f}, quantized in {reports[name].seconds:.0f} s")
    for certificate in verify_model(model, {"input_ids": pieces[0][:, :64]}).certificates:
        say(f"law {certificate}")
    return {"float32": model, "bfloat16": half}, tokenizer, quantized, losses, reports


def _export(quantized: Any, tokenizer: Any, folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Write the ONNX folder; returns what PyTorch and ONNX Runtime make of the prompt, greedily."""
    from qcompile.api.export_onnx import export_onnx
    from qcompile.generation.onnx_session import Session

    shutil.rmtree(folder, ignore_errors=True)
    # Float activations, as in PyTorch: the default rounds them to int8 in each MatMulNBits, faster and not the same.
    report = export_onnx(quantized, folder, tokenizer=tokenizer, accuracy_level=1, progress=False)
    say(f"exported to ONNX: relative difference to PyTorch {report.metrics['onnx relative error']:.1e}")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    length = inputs.input_ids.shape[1]
    ours = quantized.generate(**inputs, max_new_tokens=16, do_sample=False)[0, length:].tolist()
    theirs = list(Session(folder).stream(inputs.input_ids, len(ours)))
    if ours == theirs:
        say(f"PyTorch and ONNX Runtime generate the same {len(ours)} tokens")
    else:
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        say(f"the texts differ from token {same + 1} on: two logits are nearer to each other than the runtimes are")
    texts = {"PyTorch": ours, "ONNX Runtime": theirs}
    return {f"{name}, {INT4}": PROMPT + tokenizer.decode(t, skip_special_tokens=True) for name, t in texts.items()}


def _speed(
    floats: Mapping[str, Any], quantized: Any, budget: Budget, say: Callable[[str], None], prompt: int
) -> dict[str, ModelSpeed]:
    """Speed of the float models, bfloat16 also under Inductor, and of the recipes under qcompile, by name."""
    from qcompile.evaluation.throughput import allow_recompiles, time_models

    allow_recompiles()
    half = floats["bfloat16"]
    candidates = {
        "float32": floats["float32"],
        EAGER: half,
        INT4: torch.compile(quantized.to(torch.bfloat16), backend="qcompile", dynamic=True),
        "bfloat16": torch.compile(half, dynamic=True),
        "int8": torch.compile(half, backend="qcompile", dynamic=True, options={"recipe": "int8"}),
    }
    say(f"compiling and timing {', '.join(candidates)}; compiling takes most of the time")

    def affordable(name: str, seconds: float) -> bool:
        if name in ("float32", EAGER, INT4) or budget.affords(seconds):
            return True
        say(f"{name} is not timed: to compile a model took {seconds:.0f} s, and {max(0, budget.left):.0f} s are left")
        return False

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, half.get_input_embeddings().num_embeddings, (1, prompt), generator=generator)
    return time_models(
        candidates, ids, rounds=ROUNDS, another_round=budget.affords, another_model=affordable, progress=False
    )


def _table(losses: dict[str, float], reports: dict[str, Report], speeds: dict[str, ModelSpeed]) -> Table:
    table = Table("model", "perplexity", "to float", "weights MB", "prefill tok/s", "decode tok/s")
    sites = next(iter(reports.values())).sites
    rows = list(losses.items())
    for name, loss in [*rows[:1], (EAGER, losses["bfloat16"]), *rows[1:]]:
        width = {"float32": 4, "bfloat16": 2, EAGER: 2}.get(name, 0)
        size = reports[name].bytes_after if name in reports else sum(s.N * s.K * width for s in sites)
        speed = speeds.get(name)
        rates = (f"{speed.prefill_rate:.0f}", f"{speed.decode_rate:.1f}") if speed else ("", "")
        compiler = {"float32": " (eager)", EAGER: "", "bfloat16": " (Inductor)"}.get(name, " (qcompile)")
        table.add_row(
            name + compiler, f"{loss:.2f}", f"{loss / losses['float32'] - 1:+.1%}", f"{size / 1e6:.0f}", *rates
        )
    return table


def _plot(losses: dict[str, float], speeds: dict[str, ModelSpeed], path: Path) -> None:
    """Perplexity against tokens per second."""
    from qcompile.evaluation.plots import label_point, plot_file

    with plot_file(path, (10, 4), columns=2) as axes:
        for axis, kind in zip(axes, ("decode", "prefill"), strict=True):
            for name, speed in speeds.items():
                rate = speed.decode_rate if kind == "decode" else speed.prefill_rate
                ours, loss = name in RECIPES, losses["bfloat16" if name == EAGER else name]
                axis.scatter(rate, loss, s=60, marker="o" if ours else "s", color="C0" if ours else "0.5")
                label_point(axis, name, rate, loss)
            axis.set_xlabel(f"{kind}, tokens/s (more is better)")
            axis.grid(alpha=0.3)
            axis.margins(x=0.2, y=0.15)
        axes[0].set_ylabel("perplexity (less is better)")
        axes[0].set_title("SmolLM2-135M: squares are eager and Inductor, circles qcompile", fontsize=9)
