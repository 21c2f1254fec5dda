"""INT4 ONNX on a CPU against onnxruntime-genai's own model builder: speed, size, perplexity.

    python benches/onnx_cpu.py [TEXT [CALIBRATION_TEXT]]      writes benches/results/onnx_cpu.json and .png

Every folder, ours and the peers', runs in onnxruntime-genai in a process of its own; the processes take
turns, one at a time, so that no idle thread of another spins. Perplexity is that of the ONNX model: 4
windows of 2048 tokens. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import util
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.bench import versions
from qcompile.codegen.onnx.session import Session
from qcompile.evaluate import perplexity
from qcompile.presets import find_recipe
from qcompile.pretrained import load_pretrained
from qcompile.text import batches, read_text, windows

RESULTS = Path(__file__).parent / "results" / "onnx_cpu.json"
SAME_BLOCKS = Path(__file__).parent / "recipes" / "onnx"
OURS = [str(SAME_BLOCKS / "int4-g32.json"), str(SAME_BLOCKS / "int4-g128.json"), "int4-cpu", "int4-cpu-gptq"]
BUILDER = {
    "builder int4, block 32": ["block_size=32"],
    "builder int4, block 128": ["block_size=128"],
    "builder int4, block 32, k_quant": ["block_size=32", "algo_config=k_quant"],
}
PROMPT, NEW, ROUNDS = 512, 32, 7


def serve(folder: str) -> None:
    """Child process: at each line of stdin, time one prompt and some new tokens; print both as JSON."""
    import onnxruntime_genai as genai

    model = genai.Model(folder)
    prompt = np.random.default_rng(0).integers(3, 40000, PROMPT).astype(np.int32)
    print("ready", flush=True)
    for _ in sys.stdin:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=PROMPT + NEW + 1, min_length=PROMPT + NEW + 1)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(NEW):
            generator.generate_next_token()
        done = time.perf_counter()
        print(json.dumps([first - start, (done - first) / NEW]), flush=True)


def build_peers(work: Path, model: torch.nn.Module, tokenizer: object, console: Console) -> dict[str, Path]:
    """The folders of onnxruntime-genai's model builder."""
    if util.find_spec("onnxruntime_genai") is None:
        raise SystemExit("pip install onnxruntime-genai: it runs every folder here")
    source, found = work / "model", {}
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)  # type: ignore[attr-defined]
    for name, options in BUILDER.items():
        out = work / name.replace(" ", "-").replace(",", "")
        call = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", source, "-o", out, "-p", "int4", "-e"]
        done = subprocess.run([*call, "cpu", "--extra_options", "accuracy_level=4", *options], capture_output=True)
        if done.returncode:
            console.print(f"left out: {name}: {done.stderr.decode().strip().splitlines()[-1]}")
        else:
            found[name] = out
    return found


def time_all(folders: dict[str, Path]) -> dict[str, list[tuple[float, float]]]:
    """[seconds to the first token, seconds for a token] of each round, all folders in turn."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import onnx_cpu; onnx_cpu.serve(sys.argv[1])"
    )
    children = {
        name: subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, folder in folders.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in children}
    try:
        for child in children.values():
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for step in range(ROUNDS + 1):  # the first warms up
            for name, child in children.items():
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write("go\n")
                child.stdin.flush()
                answer = json.loads(child.stdout.readline())
                if step:
                    times[name].append((answer[0], answer[1]))
    finally:
        for child in children.values():
            child.kill()
    return times


def bandwidth() -> float:
    """Bytes a second that all cores read from memory together."""
    x = torch.ones(2**28 // 4)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        float(x.sum())
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def main() -> None:
    """Export, measure, print, write."""
    text = sys.argv[1] if len(sys.argv) > 1 else None
    calibration = sys.argv[2] if len(sys.argv) > 2 else None
    console = Console(width=140)
    model, tokenizer = load_pretrained()
    pieces = windows(tokenizer, read_text(text))
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        folders = build_peers(work, model, tokenizer, console)
        for name in OURS:
            data = batches(tokenizer, calibration, count=64) if find_recipe(name).needs else None
            out = work / f"qcompile-{Path(name).stem}"
            qcompile.export_onnx(model, out, name, data, tokenizer=tokenizer)
            folders[f"qcompile {Path(name).stem}"] = out
        times, rows, speed = time_all(folders), [], bandwidth()
        for name, folder in folders.items():
            size = sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model.onnx"))
            first, token = (statistics.median(column) for column in zip(*times[name], strict=True))
            rows.append(
                dict(
                    folder=name,
                    prefill=PROMPT / first,
                    decode=1 / token,
                    megabytes=size / 1e6,
                    perplexity=perplexity(Session(folder), pieces, label=name),
                    share_of_bandwidth=size / token / speed,
                )
            )
    table = Table("folder", "prefill 512, tokens/s", "decode, tokens/s", "MB", "perplexity", "decode / bandwidth")
    for row in rows:
        table.add_row(
            str(row["folder"]), f"{row['prefill']:.0f}", f"{row['decode']:.1f}", f"{row['megabytes']:.1f}",
            f"{row['perplexity']:.2f}", f"{row['share_of_bandwidth']:.0%}",
        )  # fmt: skip
    console.print(table)
    found = dict(versions=versions(), bandwidth=speed, prompt=PROMPT, new=NEW, rounds=ROUNDS, rows=rows)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    plot(rows)


def plot(rows: list[dict[str, object]]) -> None:
    """Prefill and decode rates side by side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(rows) + 1.5), sharey=True, layout="constrained")
    names = [str(r["folder"]) for r in rows][::-1]
    for axis, key in zip(axes, ("prefill", "decode"), strict=True):
        axis.barh(names, [r[key] for r in rows][::-1], color=["C0" if "qcompile" in n else "0.6" for n in names])
        axis.set_xlabel(f"{key}, tokens/s (more is better)")
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
