"""Cold start of a compiled LLM, whole graphs against equal blocks compiled once.

    python benches/compile_time.py [--commit]      prints a table; --commit writes benches/results/compile_time.json

SmolLM2 with w4a8 under compile_for_generate: the decode step, and a prompt of 512 tokens. Each start is a process of
its own with an empty cache of Inductor, in which only our operators are compiled already, as they are once on a
machine. Seconds are of the processor, with those of the C++ compiler, and of the clock. Speeds are medians of both
forms in one process, interleaved. Distances are of the logits, relative: between both forms, and of each from the eager
model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import qcompile
from qcompile.cli.output import print_table, tell
from qcompile.codegen.cpu.native_kernels import load_native_kernels
from qcompile.evaluation.throughput import allow_recompiles
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions

RESULTS = Path(__file__).parent / "results" / "compile_time.json"
FORMS = {"whole": False, "blocks": True}
OPTIONS = {"verify": False, "on_slow_kernel": "quantize"}
PROMPT, TOKENS, ROUNDS = 512, 24, 4


def spent() -> float:
    """Processor seconds of this process and of those that it waited for."""
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in own)


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a piece of work."""
    processor, clock = spent(), time.perf_counter()
    work()
    return {"processor_s": spent() - processor, "wall_s": time.perf_counter() - clock}


def start(folder: str, form: str) -> None:
    """A cold start in this process: prints seconds as JSON."""
    torch._inductor.config.compile_threads = 1  # so that the C++ compiler's time is this process's
    load_native_kernels()
    model = qcompile.load(folder)
    ids = torch.randint(3, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    step = timed(lambda: qcompile.compile_for_generate(model, compile_blocks=FORMS[form], **OPTIONS))
    with torch.no_grad():
        prompt = timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    print(json.dumps({"step": step, "prompt": prompt}))


def cold_start(folder: str, form: str) -> dict[str, dict[str, float]]:
    """The same in a new process with an empty cache, but for our operators."""
    with tempfile.TemporaryDirectory() as cache:
        library = Path(load_native_kernels()._name)
        shutil.copytree(library.parent, Path(cache) / library.parent.name)
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--start", folder, "--form", form]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def speeds(folder: str) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Tokens a second of both forms, interleaved, and distances of their logits."""
    allow_recompiles()
    eager = qcompile.load(folder)
    models = {form: qcompile.load(folder) for form in FORMS}
    for form, model in models.items():
        report = qcompile.compile_for_generate(model, compile_blocks=FORMS[form], **OPTIONS)
        assert report.metrics["decode steps"] == 1, report.breaks
    ids = torch.randint(3, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    times: dict[str, dict[str, list[float]]] = {form: {"prefill": [], "decode": []} for form in FORMS}
    logits: dict[str, dict[str, Tensor]] = {"prompt": {}, "step": {}}
    with torch.no_grad():
        for counted in range(ROUNDS + 1):
            outputs = dict[str, Any]()
            for form, model in models.items():
                outputs[form], seconds = call(model, ids, None)
                logits["prompt"][form] = outputs[form].logits
                times[form]["prefill"] += [seconds] * bool(counted)
            for token in range(TOKENS):
                for form, model in models.items():
                    outputs[form], seconds = call(model, ids[:, token : token + 1], outputs[form].past_key_values)
                    times[form]["decode"] += [seconds] * bool(counted)
                    if token == 0:
                        logits["step"][form] = outputs[form].logits.clone()
        logits["prompt"]["eager"] = (out := eager(input_ids=ids, use_cache=True, logits_to_keep=1)).logits
        logits["step"]["eager"] = eager(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits
    rates = {
        form: {"prefill": PROMPT / statistics.median(own["prefill"]), "decode": 1 / statistics.median(own["decode"])}
        for form, own in times.items()
    }
    pairs = ("whole", "blocks"), ("whole", "eager"), ("blocks", "eager")
    apart = {f"{what}: {a} and {b}": distance(of[a], of[b]) for what, of in logits.items() for a, b in pairs}
    return rates, apart


def call(model: nn.Module, ids: Tensor, cache: Any) -> tuple[Any, float]:
    """The output of a model, and seconds."""
    begin = time.perf_counter()
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out, time.perf_counter() - begin


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def main() -> None:
    """Measure, print, write if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--commit", action="store_true", help="write the results")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.start, options.form)
        return
    load_native_kernels()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_pretrained(dtype=torch.bfloat16)
        qcompile.quantize(model, "w4a8", verify=False, progress=False)
        qcompile.save(model, folder, tokenizer)
        starts = {form: cold_start(folder, form) for form in FORMS}
        rates, apart = speeds(folder)
    table = Table("form", "step, processor s", "wall s", "prompt, processor s", "wall s", "prefill t/s", "decode t/s")
    for form, found in starts.items():
        seconds = (found[what][kind] for what in ("step", "prompt") for kind in ("processor_s", "wall_s"))
        table.add_row(form, *(f"{s:.1f}" for s in seconds), *(f"{rates[form][k]:.1f}" for k in ("prefill", "decode")))
    print_table(table)
    for name, value in apart.items():
        tell(f"{name}: {value:.2e}")
    if options.commit:
        found = {"versions": versions(), "starts": starts, "rates": rates, "distances": apart}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
