"""Quantizing a model that is larger than memory: peak memory, time and bytes, streamed and in memory.

    python benches/streamed_memory.py                compare both on a synthetic decoder of 8 layers
    python benches/streamed_memory.py --large        12 GB of weights, each process limited to 4 GB of address space
    python benches/streamed_memory.py --layer        one layer of the shapes of Llama-70B
    python benches/streamed_memory.py --processes 2  the time of two processes of torchrun against one of two threads
    .. --recipes w4a16                               only these
    .. --commit                                      write the rows to benches/results/streamed_memory.json

Each run is a process of its own, which imports and traces a small model first: peaks are above that. The weights are
random, which changes neither memory nor time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from qcompile.cli.output import print_table, tell
from qcompile.memory.environment import versions

RESULTS = Path(__file__).parent / "results" / "streamed_memory.json"
RECIPES = ["w4a16", "w4a16-gptq"]
SIZES = {
    "8 layers of 2048": dict(hidden=2048, inner=5632, layers=8),
    "206 layers of 2048": dict(hidden=2048, inner=2048, layers=206),
    "2 layers of 2048": dict(hidden=2048, inner=5632, layers=2),
    "1 layer of 8192": dict(hidden=8192, inner=28672, layers=1, groups=8),
    "tiny": dict(hidden=64, inner=64, layers=1),
}
BATCHES, TOKENS, VOCABULARY, LIMIT = 8, 256, 8192, 4_000_000_000


def _key_rows(of: dict[str, int]) -> int:
    """Rows of the projections to keys and values, which groups of heads may share."""
    heads = max(1, of["hidden"] // 128)
    return of["hidden"] * of.get("groups", heads) // heads


def make(size: str, folder: Path) -> None:
    """Write a decoder with random bfloat16 weights, layer by layer: it is never whole in memory."""
    import torch
    from transformers import AutoConfig

    from qcompile.checkpoint.tensor_file import INDEX, write_shard

    of = SIZES[size]
    h, i = of["hidden"], of["inner"]
    heads, k = max(1, h // 128), _key_rows(of)
    config = AutoConfig.for_model(
        "llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=h,
        intermediate_size=i,
        num_hidden_layers=of["layers"],
        num_attention_heads=heads,
        num_key_value_heads=of.get("groups", heads),
        tie_word_embeddings=False,
        max_position_embeddings=512,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    def layer(index: int) -> dict[str, torch.Tensor]:
        shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (k, h), "self_attn.v_proj": (k, h)}
        shapes |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        found = {f"model.layers.{index}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{index}.{name}.weight"] = torch.ones(h, dtype=torch.bfloat16)
        return found

    places: dict[str, str] = {}
    for number in range(of["layers"] + 1):
        if number < of["layers"]:
            tensors = layer(number)
        else:
            tensors = {"model.embed_tokens.weight": random(VOCABULARY, h), "lm_head.weight": random(VOCABULARY, h)}
            tensors["model.norm.weight"] = torch.ones(h, dtype=torch.bfloat16)
        name = f"model-{number + 1:05}-of-{of['layers'] + 1:05}.safetensors"
        write_shard(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / f"model{INDEX}").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def one(source: str, out: str, recipe: str, streamed: bool, tiny: str) -> dict[str, Any]:
    """Quantize a folder in this process; seconds, peak bytes, and the plan."""
    import warnings

    import torch
    from transformers import AutoModelForCausalLM

    import qcompile
    from qcompile.api.memory_plan import MemoryPlan
    from qcompile.api.quantize_folder import quantize_folder
    from qcompile.memory.process import measure_peak, resident_bytes

    warnings.simplefilter("ignore")
    plans: list[MemoryPlan] = []
    inner = MemoryPlan.within

    def within(plan: MemoryPlan, limit: int | None) -> MemoryPlan:
        plans.append(inner(plan, limit))
        return plans[-1]

    MemoryPlan.within = within  # type: ignore[method-assign]  # the plan of the run is a row of the table
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator) for _ in range(BATCHES)]
    with tempfile.TemporaryDirectory() as warm:
        quantize_folder(tiny, Path(warm) / "out", recipe, batches, progress=False)
    start = time.perf_counter()
    with measure_peak() as peak:
        if streamed:
            quantize_folder(source, out, recipe, batches, progress=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(source).eval()
            qcompile.quantize(model, recipe, batches, progress=False)
            qcompile.save(model, out)
    whole = resident_bytes("VmHWM")
    planned = plans[-1].peak if streamed else None
    return {"seconds": time.perf_counter() - start, "peak": peak.bytes, "process": whole, "planned": planned}


def bar(size: str, recipe: str) -> int:
    """(The largest layer in float32, its Hessians, the residual stream) x 1.25, in bytes."""
    of = SIZES[size]
    h, i = of["hidden"], of["inner"]
    layer = 4 * (2 * h * h + 2 * h * _key_rows(of) + 3 * h * i)
    hessians = 8 * (3 * h * h + i * i) if "gptq" in recipe else 0
    stream = 2 * BATCHES * TOKENS * (h + max(h, i)) if "gptq" in recipe else 0
    return int(1.25 * (layer + hessians + stream))


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files but for the log."""
    names = sorted(path.name for path in first.iterdir() if path.name != "quantize.jsonl")
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def run(arguments: list[object], work: Path, limit: int | None = None, processes: int = 0) -> dict[str, Any]:
    """`one` in a process of its own, or in several that torchrun starts, with as many threads in all."""
    lines = [f"import sys, json, os; sys.path.insert(0, {str(Path(__file__).parent)!r}); import streamed_memory as s"]
    if limit is not None:
        lines.append(f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))")
    lines += [f"row = s.one(*{arguments!r})", "if os.environ.get('RANK', '0') == '0': print(json.dumps(row))"]
    (work / "one.py").write_text("\n".join(lines))
    start = [sys.executable]
    environment = dict(os.environ)
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment["OMP_NUM_THREADS"] = str(max(1, int(versions()["threads"]) // processes))
    done = subprocess.run([*start, str(work / "one.py")], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Make the models, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="12 GB of weights under a limit of 4 GB")
    parser.add_argument("--layer", action="store_true", help="one layer of the shapes of Llama-70B, streamed")
    parser.add_argument("--processes", type=int, default=0, help="compare this many processes with one")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--commit", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    given = {
        "206 layers of 2048": options.large,
        "1 layer of 8192": options.layer,
        "2 layers of 2048": options.processes,
    }
    size = next((size for size, chosen in given.items() if chosen), "8 layers of 2048")
    table = Table(
        "model", "recipe", "way", "seconds", "peak MB", "bar MB", "of the process MB", "planned MB", "same bytes"
    )
    rows = []
    variants = ["streamed"] if options.large or options.layer else ["in memory", "streamed"]
    if options.processes:
        variants = ["streamed", f"{options.processes} processes"]
    with tempfile.TemporaryDirectory() as work:
        source, tiny = Path(work) / "model", Path(work) / "tiny"
        for name, folder in ((size, source), ("tiny", tiny)):
            folder.mkdir()
            make(name, folder)
        weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        tell(f"{size}: {weights / 1e9:.2f} GB of weights")
        for recipe in options.recipes:
            outs: list[Path] = []
            for way in variants:
                outs.append(Path(work) / f"{recipe}-{len(outs)}")
                limit, streamed = LIMIT if options.large else None, way != "in memory"
                processes = options.processes if way.endswith("processes") else 0
                row = run([str(source), str(outs[-1]), recipe, streamed, str(tiny)], Path(work), limit, processes)
                equal = same_bytes(*outs) if len(outs) == 2 else None
                row |= {"model": size, "weights": weights, "recipe": recipe, "streamed": streamed, "same_bytes": equal}
                row |= {"processes": max(1, processes)}
                row |= {"bar": bar(size, recipe), "limit": limit, "isa": versions()["isa"]}
                rows.append(row)
                cells = [f"{row[key] / 1e6:.0f}" if row[key] else "" for key in ("peak", "bar", "process", "planned")]
                table.add_row(recipe, way, f"{row['seconds']:.0f}", *cells, "" if equal is None else str(equal))
    print_table(table)
    if options.commit:
        others = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
        now = {(row["model"], row["recipe"]) for row in rows}
        rows = [*(row for row in others if (row["model"], row["recipe"]) not in now), *rows]
        RESULTS.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
