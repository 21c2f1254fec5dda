"""INT4 ONNX on a CPU against onnxruntime-genai's own model builder: speed, size, memory, perplexity.

    python benches/onnx_cpu.py [TEXT [CALIBRATION_TEXT]]
    python benches/onnx_cpu.py --quick      speed of a few folders: no GPTQ, no perplexity, each long prompt once

writes benches/results/onnx_cpu-ISA.json and .png; ISA is this processor's int8 instruction set: amx, vnni, avx2.

Every folder, ours and the peers', runs in onnxruntime-genai in a process of its own; the processes are interleaved, one
at a time, so that no idle thread of another spins. All are started five times, since the place of its memory makes a
process some percent faster or slower. After a long prompt, which takes seconds to read, each decodes several times.
Perplexity is that of the ONNX model: 4 windows of 2048 tokens. Peers that are not installed are named and skipped. Last
comes the number of tokens from which int8 weights are faster than 4-bit codes (DECODE_TOKENS in codegen/onnx/lowering).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from roofline import bandwidth, int8_rate

import qcompile
from qcompile.calibration.text import batches, read_text, windows
from qcompile.cli.output import print_table, tell
from qcompile.codegen.onnx.genai_config import FILE
from qcompile.evaluation.perplexity import perplexity
from qcompile.evaluation.plots import plot_file
from qcompile.generation.onnx_session import Session
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.numerics.int8_matmul import processor
from qcompile.pipeline.find_recipe import find_recipe

RESULTS = Path(__file__).parent / "results" / f"onnx_cpu-{processor()}.json"
SAME_BLOCKS = Path(__file__).parent / "recipes" / "onnx"
BEST = "int4-cpu-gptq"
CHUNK = 256  # prefill chunk of onnxruntime-genai in tokens, of a peer's folder too
OURS = {  # name -> recipe, options of the export
    "int4-g32": (str(SAME_BLOCKS / "int4-g32.json"), {}),
    "int4-g128": (str(SAME_BLOCKS / "int4-g128.json"), {}),
    "int4-cpu": ("int4-cpu", {}),
    "int4-gptq-per-token": (str(SAME_BLOCKS / "int4-gptq-per-token.json"), {}),  # BEST without PerTensorActivations
    BEST: (BEST, {}),
    f"{BEST}, low memory": (BEST, {"low_memory": True}),
    f"{BEST}, last logits": (BEST, {"last_logits": True}),
    f"{BEST}, last logits, chunks": (BEST, {"last_logits": True, "chunk": CHUNK}),
}
BUILDER = {
    "GenAI int4, block 32": ["block_size=32"],
    "GenAI int4, block 128": ["block_size=128"],
    "GenAI int4, block 32, k_quant": ["block_size=32", "algo_config=k_quant"],
    "GenAI int4, block 128, last logits": ["block_size=128", "prune_lm_head=true"],
}
QUICK = {
    "int4-cpu": ("int4-cpu", {}),
    "int4-cpu, low memory": ("int4-cpu", {"low_memory": True}),
    "int4-cpu, last logits, chunks": ("int4-cpu", {"last_logits": True, "chunk": CHUNK}),
}
PROMPT, NEW, PROCESSES, ROUNDS = 512, 32, 5, 3
LONG = {2048: 2, 4096: 2, 7800: 1}  # longer prompts, and how many times each is timed
DECODES = 9  # times that a folder decodes NEW tokens after each of them
SHORT_ONLY = {"GenAI int4, block 32, k_quant", *(f"qcompile {name}" for name in list(OURS)[:4])}


def serve(folder: str) -> None:
    """Child process: at each line "PROMPT NEW", time one prompt and some new tokens; print both and memory as JSON.

    "0 NEW" continues after what was read last, at most DECODES times.
    """
    import onnxruntime_genai as genai

    from qcompile.memory.process import release_freed_memory, resident_bytes

    before, start, config = resident_bytes(), time.perf_counter(), genai.Config(folder)
    # By itself it may take fewer threads than there are cores: one of two on some virtual machines.
    threads = {"intra_op_num_threads": torch.get_num_threads()}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = genai.Model(config)
    opened, peak = time.perf_counter() - start, resident_bytes("VmHWM") - before
    release_freed_memory()  # what opening needed for a moment
    print(json.dumps([opened, peak]), flush=True)
    for line in sys.stdin:
        length, new = map(int, line.split())
        start = time.perf_counter()
        if length:
            prompt = np.random.default_rng(0).integers(3, 40000, length).astype(np.int32)
            parameters, longest = genai.GeneratorParams(model), length + 1 + (1 + DECODES) * new
            parameters.set_search_options(max_length=longest, min_length=longest)
            generator = genai.Generator(model, parameters)
            start = time.perf_counter()
            generator.append_tokens(prompt)
            generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        done = time.perf_counter()
        print(json.dumps([first - start, (done - first) / max(1, new), resident_bytes() - before]), flush=True)


def need_genai() -> None:
    """End the process with a message if onnxruntime-genai is not installed."""
    if util.find_spec("onnxruntime_genai") is None:
        raise SystemExit("pip install onnxruntime-genai: it runs every folder here")


def run_builder(source: Path, out: Path, precision: str, options: Sequence[str]) -> str | None:
    """Run onnxruntime-genai's own model builder; returns the last line of its error, or None."""
    call = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", source, "-o", out, "-e", "cpu"]
    more = ["--extra_options", *options] if options else []
    done = subprocess.run([*call, "-p", precision, *more], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def build_peers(work: Path, model: torch.nn.Module, tokenizer: object, console: Console) -> dict[str, Path]:
    """The folders of onnxruntime-genai's model builder."""
    need_genai()
    source, found = work / "model", {}
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)  # type: ignore[attr-defined]
    for name, options in BUILDER.items():
        out = work / name.replace(" ", "-").replace(",", "")
        if (refused := run_builder(source, out, "int4", ["accuracy_level=4", *options])) is not None:
            console.print(f"skipped: {name}: {refused}")
        else:
            found[name] = out
    if (whole := found.get("GenAI int4, block 128, last logits")) is not None:
        shutil.copytree(whole, part := work / "genai-chunks", copy_function=os.link)
        described = json.loads((whole / FILE).read_text())
        described["search"]["chunk_size"] = CHUNK
        (part / FILE).unlink()
        (part / FILE).write_text(json.dumps(described))
        found["GenAI int4, block 128, last logits, chunks"] = part
    return found


class Child:
    """A folder in a process of its own; `serve` is what runs there, as "module.function" of this directory."""

    def __init__(self, folder: Path | str, serve: str = "onnx_cpu.serve") -> None:
        place, module = str(Path(__file__).parent), serve.split(".")[0]
        script = f"import sys; sys.path.insert(0, {place!r}); import {module}; {serve}(sys.argv[1])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.opened, self.peak = self._answer()

    def _answer(self) -> list[float]:
        assert self.process.stdout is not None
        return list(json.loads(self.process.stdout.readline()))

    def ask(self, prompt: int, new: int) -> list[float]:
        """Seconds to the first token, seconds for each further one, resident bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{prompt} {new}\n")
        self.process.stdin.flush()
        return self._answer()


def time_all(folders: dict[str, Path], lengths: dict[int, int], short: set[str]) -> dict[str, dict[str, Any]]:
    """Rates and memory of all folders, and longer prompts of those that are not in `short`, interleaved."""
    answers: dict[str, list[list[float]]] = {name: [] for name in folders}  # as Child.ask gives them
    opened: dict[str, list[list[float]]] = {name: [] for name in folders}
    long: dict[str, dict[int, dict[str, float]]] = {}
    for start in range(PROCESSES):
        children = {name: Child(folder) for name, folder in folders.items()}
        try:
            for step in range(ROUNDS + 1):  # the first warms up
                for name, child in children.items():
                    answer = child.ask(PROMPT, NEW)
                    if step:
                        answers[name].append(answer)
            if start == PROCESSES - 1:
                long = time_long({name: child for name, child in children.items() if name not in short}, lengths)
        finally:
            for name, child in children.items():
                opened[name].append([child.opened, child.peak])
                child.process.kill()
    return {
        name: dict(
            prefill=PROMPT / middle(answers[name], 0),
            decode=1 / middle(answers[name], 1),
            opened=middle(opened[name], 0),
            opening_peak_megabytes=middle(opened[name], 1) / 1e6,
            memory_megabytes=middle(answers[name], 2) / 1e6,
            long=long.get(name, {}),
        )
        for name in folders
    }


def time_long(children: dict[str, Child], lengths: dict[int, int]) -> dict[str, dict[int, dict[str, float]]]:
    """Seconds to the first token after longer prompts, and the rate of further ones."""
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in children}
    for length, times in lengths.items():
        first: dict[str, list[list[float]]] = {name: [] for name in children}
        after: dict[str, list[list[float]]] = {name: [] for name in children}
        for _ in range(times):
            for name, child in children.items():
                first[name].append(child.ask(length, NEW))
            for _ in range(DECODES):
                for name, child in children.items():
                    after[name].append(child.ask(0, NEW))
        for name, rates in found.items():
            rates[length] = dict(first=middle(first[name], 0), decode=1 / middle(after[name], 1))
    return found


def middle(answers: Sequence[Sequence[float]], column: int) -> float:
    """The median of a column."""
    return statistics.median(answer[column] for answer in answers)


def time_few_tokens(folder: Path, threads: int) -> list[dict[str, float]]:
    """Milliseconds of a few tokens by 4-bit codes and by int8 weights, after a cache of 256."""
    import onnx
    import onnxruntime

    model, options, sessions = onnx.load(str(folder / "model.onnx"), load_external_data=False), None, {}
    limit = next(node for node in model.graph.node if node.op_type == "LessOrEqual").input[1]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for branch, few in (("codes", 10**6), ("int8", 0)):
        threshold = next(tensor for tensor in model.graph.initializer if tensor.name == limit)
        threshold.CopyFrom(onnx.numpy_helper.from_array(np.array(few, np.int64), limit))
        onnx.save(model, str(folder / f"{branch}.onnx"))
        sessions[branch] = onnxruntime.InferenceSession(
            str(folder / f"{branch}.onnx"), options, ["CPUExecutionProvider"]
        )
    rows = []
    for tokens in (1, 2, 3, 4, 6, 8, 16):
        _, _, *caches = inputs = sessions["codes"].get_inputs()
        kind = np.int8 if caches[0].type == "tensor(int8)" else np.float32
        cache = [np.zeros((1, i.shape[1], 256, i.shape[3]), kind) for i in caches]
        ids, mask = np.full((1, tokens), 7), np.ones((1, 256 + tokens), np.int64)
        feeds = dict(zip((i.name for i in inputs), (ids, mask, *cache), strict=True))
        times: dict[str, list[float]] = {branch: [] for branch in sessions}
        for step in range(22):
            for branch, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feeds)
                if step > 1:
                    times[branch].append(time.perf_counter() - start)
        rows.append(dict(tokens=tokens, **{branch: 1e3 * statistics.median(t) for branch, t in times.items()}))
    return rows


def main() -> None:
    """Export, measure, print, write."""
    quick = "--quick" in sys.argv
    text, calibration, *_ = [*(a for a in sys.argv[1:] if a != "--quick"), None, None]
    ours, best, lengths, short = (
        (QUICK, "int4-cpu", {2048: 1, 4096: 1}, set()) if quick else (OURS, BEST, LONG, SHORT_ONLY)
    )
    console = Console(width=140)
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, read_text(text))
    embedding = model.get_input_embeddings().weight.numel()
    sites = sum(p.numel() for p in model.parameters() if p.ndim == 2) - embedding
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        folders = build_peers(work, model, tokenizer, console)
        quantized: dict[str, torch.nn.Module] = {}
        for name, (recipe, options) in ours.items():
            if recipe not in quantized:
                data = batches(tokenizer, calibration, count=64) if find_recipe(recipe).needs else None
                quantized[recipe] = copy.deepcopy(model)
                qcompile.quantize(quantized[recipe], recipe, data)
            out = work / f"qcompile-{name.replace(', ', '-').replace(' ', '-')}"
            qcompile.export_onnx(quantized[recipe], out, tokenizer=tokenizer, **options)
            folders[f"qcompile {name}"] = out
        del quantized
        speed, rates = bandwidth(), {kind: int8_rate(kind) for kind in ("s8", "u8")}
        rate, times, rows = max(rates.values()), time_all(folders, lengths, short), []
        few_tokens = time_few_tokens(folders[f"qcompile {best}"], torch.get_num_threads())
        for name, folder in folders.items():
            size = sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model.onnx"))
            row = dict(folder=name, **times[name], megabytes=size / 1e6)
            row["share_of_bandwidth"] = size * times[name]["decode"] / speed
            weights = sites + (embedding if "last logits" not in name else 0)  # multiplied for every token
            row["share_of_int8"] = weights * times[name]["prefill"] / rate
            same = any(
                word in name for word in ("last logits", "low memory", "chunks")
            )  # as another's, or not computed
            if not (quick or same):
                row["perplexity"] = perplexity(Session(folder), pieces, label=name)
            rows.append(row)
    table = Table(
        "folder", "prefill 512", "decode", "open MB", "file MB", "perplexity", "decode / bandwidth", "prefill / int8"
    )
    for row in rows:
        table.add_row(
            row["folder"], f"{row['prefill']:.0f}", f"{row['decode']:.1f}", f"{row['memory_megabytes']:.0f}",
            f"{row['megabytes']:.1f}", f"{row['perplexity']:.2f}" if "perplexity" in row else "",
            f"{row['share_of_bandwidth']:.0%}", f"{row['share_of_int8']:.0%}",
        )  # fmt: skip
    print_table(table)
    long = Table("folder", *(f"{n} tokens, s to first" for n in lengths), f"decode after {max(lengths)}")
    for row in (row for row in rows if row["long"]):
        long.add_row(
            row["folder"],
            *(f"{row['long'][n]['first']:.2f}" for n in lengths),
            f"{row['long'][max(lengths)]['decode']:.1f}",
        )
    print_table(long)
    for r in few_tokens:
        tell(f"{r['tokens']} tokens: codes {r['codes']:.2f} ms, int8 {r['int8']:.2f} ms")
    found = dict(
        versions=versions(), threads=torch.get_num_threads(), bandwidth=speed, int8_rates=rates, prompt=PROMPT,
        new=NEW, processes=PROCESSES, rounds=ROUNDS, few_tokens=few_tokens, rows=rows,
    )  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    """Prefill and decode rates side by side."""
    names = [str(r["folder"]) for r in rows][::-1]
    with plot_file(RESULTS.with_suffix(".png"), (11, 0.5 * len(rows) + 1.5), columns=2) as axes:
        for axis, key in zip(axes, ("prefill", "decode"), strict=True):
            axis.barh(names, [r[key] for r in rows][::-1], color=["C0" if "qcompile" in n else "0.6" for n in names])
            axis.set_xlabel(f"{key}, tokens/s (more is better)")


if __name__ == "__main__":
    main()
