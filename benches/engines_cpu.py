"""SmolLM2 on a CPU in other engines: llama.cpp, ik_llama.cpp, OpenVINO, GenAI, torchao, torch.compile in bfloat16.

    pip install onnxruntime-genai gguf llama-cpp-python openvino torchao
    python benches/engines_cpu.py [CALIBRATION_TEXT]      writes benches/results/engines_cpu-ISA.json
        --ik-llama-bench PATH    the `llama-bench` of ik_llama.cpp, which is not in a package
        --only TEXT ..           engines whose name has one of these in it; prints and writes no file

An engine that is not installed is skipped with a message; llama-cpp-python is for the processor that CMAKE_ARGS names
when it is built (docs/results/onnx-cpu.md). Each runs in a process of its own, interleaved, with a rest before each;
all are started three times; medians. ik_llama.cpp repacks its weights when it opens a file (`-rtr 1`). The last column
is the share of the memory's read bandwidth, measured in the same run, that a decoded token's weights are read at.
The GGUF file for llama.cpp is written here with the `gguf` package, in its own formats: Q4_0, and Q8_0 for the tied
embedding (its tools take Q6_K there, which needs columns in multiples of 256). OpenVINO reads the file of standard
operators that qcompile writes (contrib_ops=False), 4-bit codes in groups of 32, with its KV caches as state.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx_cpu import BEST, CHUNK, NEW, PROMPT, Child, need_genai, run_builder
from rich.console import Console
from rich.table import Table
from roofline import bandwidth, int8_rate

import qcompile
from qcompile.calibration.text import batches
from qcompile.evaluation.throughput import time_text
from qcompile.generation.pretrained import load_pretrained
from qcompile.memory.environment import versions
from qcompile.memory.process import resident_bytes
from qcompile.numerics.int8_matmul import processor

RESULTS = Path(__file__).parent / "results" / f"engines_cpu-{processor()}.json"
PROCESSES, ROUNDS = 3, 3
REST = 1.0  # seconds before each measurement: the idle threads of some engines spin on for a while
NEEDS = {  # skipped if absent
    "llama_cpp": "llama-cpp-python",
    "gguf": "gguf",
    "openvino": "openvino",
    "torchao": "torchao",
}
STEPS = ("w4a8", "int8")  # recipes of compile_for_generate


def answer(time_one: Callable[[np.ndarray, int], tuple[float, float]], before: int, opened: float) -> None:
    """Child process: the protocol of onnx_cpu.serve; `time_one` gives seconds to the first token, for each further."""
    print(json.dumps([opened, resident_bytes("VmHWM") - before]), flush=True)
    for line in sys.stdin:
        length, new = map(int, line.split())
        times = time_one(np.random.default_rng(0).integers(3, 40000, length), new)
        print(json.dumps([*times, resident_bytes() - before]), flush=True)


def stepwise(step: Callable[[np.ndarray, bool], int]) -> Callable[[np.ndarray, int], tuple[float, float]]:
    """Times an engine whose `step` reads tokens, of a new text or of the same one, and returns the next."""

    def time_one(prompt: np.ndarray, new: int) -> tuple[float, float]:
        start = time.perf_counter()
        token = step(prompt, True)
        first = time.perf_counter()
        for _ in range(new):
            token = step(np.array([token]), False)
        return first - start, (time.perf_counter() - first) / max(1, new)

    return time_one


def serve_llama_cpp(path: str) -> None:
    """Child process: a GGUF file."""
    from llama_cpp import Llama, llama_get_logits

    before, start = resident_bytes(), time.perf_counter()
    threads = torch.get_num_threads()
    model = Llama(path, n_ctx=2 * PROMPT, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False)

    def step(tokens: np.ndarray, begin: bool) -> int:
        if begin:
            model.reset()
        model.eval(tokens.tolist())
        return int(np.argmax(np.ctypeslib.as_array(llama_get_logits(model.ctx), (model.n_vocab(),))))

    answer(stepwise(step), before, time.perf_counter() - start)


def serve_openvino(path: str) -> None:
    """Child process: a file of standard operators, its caches as state."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    before, start = resident_bytes(), time.perf_counter()
    core = openvino.Core()
    model = core.read_model(path)
    pasts = [i for i in model.inputs if "past_key_values" in i.get_any_name()]
    shapes = {i: ([1, -1] if i not in pasts else [1, i.partial_shape[1], -1, i.partial_shape[3]]) for i in model.inputs}
    model.reshape({i.get_any_name(): openvino.PartialShape(shape) for i, shape in shapes.items()})
    pairs = {i.get_any_name(): i.get_any_name().replace("past_key_values", "present") for i in pasts}
    apply_make_stateful_transformation(model, pairs)
    request = core.compile_model(
        model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    ).create_infer_request()
    past = 0

    def step(tokens: np.ndarray, begin: bool) -> int:
        nonlocal past
        if begin:
            request.reset_state()
            past = 0
        past += len(tokens)
        found = request.infer({"input_ids": tokens[None], "attention_mask": np.ones((1, past), np.int64)})
        return int(np.argmax(found[0][0, -1]))

    answer(stepwise(step), before, time.perf_counter() - start)


def serve_inductor(kind: str) -> None:
    """Child process: torch.compile's own backend, of a float model ("bfloat16") or of one by torchao ("torchao")."""
    torch._dynamo.config.recompile_limit = 256
    before, start = resident_bytes(), time.perf_counter()
    model, _ = load_pretrained(dtype=torch.bfloat16)
    if kind == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    answer(text_timer(torch.compile(model, dynamic=True)), before, time.perf_counter() - start)


def serve_step(recipe: str) -> None:
    """Child process: `qcompile.compile_for_generate`."""
    torch._dynamo.config.recompile_limit = 256
    before, start = resident_bytes(), time.perf_counter()
    model, _ = load_pretrained(dtype=torch.bfloat16)
    report = qcompile.compile_for_generate(model, recipe, verify=False, on_slow_kernel="quantize")
    assert report.metrics["decode steps"] == 1, report.breaks
    answer(text_timer(model), before, time.perf_counter() - start)


def text_timer(model: Callable[..., Any]) -> Callable[[np.ndarray, int], tuple[float, float]]:
    """Times a causal LM of transformers."""

    def time_one(prompt: np.ndarray, new: int) -> tuple[float, float]:
        first, further = time_text(model, torch.from_numpy(prompt)[None], new)
        return first, statistics.median(further)

    return time_one


def serve_ik_llama(command: str) -> None:
    """Child process: `llama-bench` of ik_llama.cpp and a GGUF file, as JSON; opened again for each measurement."""
    program, path = json.loads(command)
    threads = str(torch.get_num_threads())

    def time_one(prompt: np.ndarray, new: int) -> tuple[float, float]:
        length = str(len(prompt))
        sizes = ["-p", length, "-n", "0", "-gp", f"{length},{new}"]
        call = [program, "-m", path, *sizes, "-t", threads, "-r", "1", "-rtr", "1", "-o", "json"]
        rows = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        rates = {"prompt" if row["n_gen"] == 0 else "new": row["avg_ts"] for row in rows}
        return len(prompt) / rates["prompt"], 1 / rates["new"]

    answer(time_one, resident_bytes(), 0.0)


def write_gguf(model: torch.nn.Module, tokenizer: Any, path: Path) -> None:
    """A Llama as GGUF: linears in Q4_0, the embedding in Q8_0, norms in float32."""
    import gguf

    config: Any = model.config
    kind = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(config.vocab_size))))
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = weight.float()
        if heads:  # its rotary embedding rotates neighboring channels, ours the halves of a head
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape)
        form = kind.F32 if values.ndim == 1 else kind.Q8_0 if "embed_tokens" in name else kind.Q4_0
        known = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(known, gguf.quantize(values.numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Engine = tuple[str, str, float]
"""A function of a child process, its argument, and the megabytes of weights that a decoded token reads (0: unknown)."""


def build(work: Path, given: argparse.Namespace, console: Console) -> dict[str, Engine]:
    """The engines by their names, those that are wanted and installed."""

    def wanted(name: str) -> bool:
        return not given.only or any(text in name for text in given.only)

    missing = {package for module, package in NEEDS.items() if util.find_spec(module) is None}
    for package in sorted(missing):
        console.print(f"skipped, not installed: {package}")
    model, tokenizer = load_pretrained()
    found: dict[str, Engine] = {}
    floats = "torch.compile, bfloat16"
    found |= {floats: ("engines_cpu.serve_inductor", "bfloat16", megabytes(model) / 2)} if wanted(floats) else {}
    if "torchao" not in missing and wanted("torchao, int8"):
        found["torchao, int8"] = ("engines_cpu.serve_inductor", "torchao", 0)
    for recipe in STEPS:
        if wanted(name := f"qcompile {recipe}, compile_for_generate"):
            small = copy.deepcopy(model)
            report = qcompile.quantize(small, recipe, verify=False, progress=False)
            found[name] = ("engines_cpu.serve_step", recipe, sum(s.bytes_after for s in report.sites) / 1e6)
    found |= _genai(work, model, tokenizer, wanted, console)
    if "gguf" not in missing and (wanted("llama.cpp") or wanted("ik_llama.cpp")):
        write_gguf(model, tokenizer, path := work / "model.gguf")
        size = path.stat().st_size / 1e6
        if "llama-cpp-python" not in missing and wanted("llama.cpp, Q4_0"):
            found["llama.cpp, Q4_0"] = ("engines_cpu.serve_llama_cpp", str(path), size)
        if given.ik_llama_bench is None:
            console.print("skipped, no --ik-llama-bench: ik_llama.cpp")
        elif wanted("ik_llama.cpp, Q4_0"):
            command = json.dumps([str(given.ik_llama_bench), str(path)])
            found["ik_llama.cpp, Q4_0"] = ("engines_cpu.serve_ik_llama", command, size)
    data = batches(tokenizer, given.text, count=64)
    if "openvino" not in missing and wanted("OpenVINO"):
        out, small = work / "standard", copy.deepcopy(model)
        qcompile.quantize(small, "int4-cpu", data)  # in groups of 32: OpenVINO wants them to divide the columns
        qcompile.export_onnx(small, out, tokenizer=tokenizer, contrib_ops=False, low_memory=True, last_logits=True)
        found["OpenVINO, qcompile's standard operators"] = (
            "engines_cpu.serve_openvino",
            str(out / "model.onnx"),
            folder_megabytes(out),
        )
    if wanted(name := f"qcompile {BEST}, last logits, chunks"):
        qcompile.quantize(model, BEST, data)
        qcompile.export_onnx(model, work / "ours", tokenizer=tokenizer, last_logits=True, chunk=CHUNK)
        found[name] = ("onnx_cpu.serve", str(work / "ours"), folder_megabytes(work / "ours"))
    return found


def _genai(
    work: Path, model: torch.nn.Module, tokenizer: Any, wanted: Callable[[str], bool], console: Console
) -> dict[str, Engine]:
    """Folders of onnxruntime-genai's own model builder."""
    found: dict[str, Engine] = {}
    last = "prune_lm_head=true"  # as in all others: logits of the last token only
    for precision, options in (("fp32", [last]), ("int4", [last, "accuracy_level=4", "block_size=128"])):
        if not wanted(name := f"GenAI, {precision}"):
            continue
        need_genai()
        if not (work / "model").exists():
            model.save_pretrained(work / "model")
            tokenizer.save_pretrained(work / "model")
        if (refused := run_builder(work / "model", work / precision, precision, options)) is not None:
            console.print(f"skipped: model builder, {precision}: {refused}")
        else:
            found[name] = ("onnx_cpu.serve", str(work / precision), folder_megabytes(work / precision))
    return found


def megabytes(model: torch.nn.Module) -> float:
    """Of the parameters, tied ones once."""
    return sum(p.nbytes for p in model.parameters()) / 1e6


def folder_megabytes(folder: Path) -> float:
    """Of the ONNX files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if ".onnx" in path.name) / 1e6


def measure(engines: dict[str, Engine], console: Console) -> dict[str, list[list[float]]]:
    """Answers of each engine: seconds to the first token, for each further one, resident bytes."""
    times: dict[str, list[list[float]]] = {}
    for _ in range(PROCESSES):
        children = {}
        for name, (function, argument, _) in engines.items():
            try:
                children[name] = Child(argument, function)
            except ValueError:  # no answer
                console.print(f"skipped, does not open: {name}")
        try:
            for step in range(ROUNDS + 1):  # the first warms up and compiles
                for name, child in children.items():
                    time.sleep(REST)
                    found = child.ask(PROMPT, NEW)
                    if step:
                        times.setdefault(name, []).append(found)
        finally:
            for child in children.values():
                child.process.kill()
    return times


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="calibration text")
    parser.add_argument("--ik-llama-bench", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    given = parser.parse_args()
    if given.ik_llama_bench is not None and not given.ik_llama_bench.is_file():
        parser.error(f"{given.ik_llama_bench} is not a file. Fix: the llama-bench that ik_llama.cpp's build made")
    console, rows = Console(width=120), []
    limits = dict(read_GBs=bandwidth() / 1e9, int8_GMACs=int8_rate("s8") / 1e9)
    with tempfile.TemporaryDirectory() as place:
        engines = build(Path(place), given, console)
        times = measure(engines, console)
    table = Table("engine", f"prefill of {PROMPT}, tokens/s", "decode, tokens/s", "open MB", "of the bandwidth")
    for name, found in times.items():
        first, further, memory = (statistics.median(column) for column in zip(*found, strict=True))
        share = engines[name][2] / 1e3 / further / limits["read_GBs"] or None
        rows.append(
            dict(
                engine=name,
                prefill=PROMPT / first,
                decode=1 / further,
                memory_megabytes=memory / 1e6,
                bandwidth_share=share,
            )
        )
        shown = "" if share is None else f"{share:.0%}"
        table.add_row(name, f"{PROMPT / first:.0f}", f"{1 / further:.1f}", f"{memory / 1e6:.0f}", shown)
    console.print(f"{limits['read_GBs']:.1f} GB/s read, {limits['int8_GMACs']:.0f} G multiply-adds of int8 a second")
    console.print(table)
    if given.only:
        return
    present = ["onnxruntime-genai", *(package for module, package in NEEDS.items() if util.find_spec(module))]
    peers = {package: metadata.version(package) for package in present}
    if given.ik_llama_bench is not None:
        peers["ik_llama.cpp"] = "built from source"
    result = dict(
        versions={**versions(), **peers},
        **limits,
        prompt=PROMPT,
        new=NEW,
        processes=PROCESSES,
        rounds=ROUNDS,
        rows=rows,
    )
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
