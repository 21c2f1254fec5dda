"""SmolLM2 on a CPU in other engines: llama.cpp, OpenVINO, ONNX Runtime in float32, torch.compile in bfloat16.

    pip install onnxruntime-genai gguf llama-cpp-python openvino
    python benches/engines_cpu.py [CALIBRATION_TEXT]      writes benches/results/engines_cpu-ISA.json

An engine that is not installed is skipped with a message; llama-cpp-python is for the processor that CMAKE_ARGS names
when it is built (docs/results/onnx-cpu.md). Each runs in a process of its own, interleaved, with a rest before each;
all are started three times; medians.
The GGUF file for llama.cpp is written here with the `gguf` package, in its own formats: Q4_0, and Q8_0 for the tied
embedding (its tools take Q6_K there, which needs columns in multiples of 256). OpenVINO reads the file of standard
operators that qcompile writes (contrib_ops=False), 4-bit codes in groups of 32, with its KV caches as state.
"""

from __future__ import annotations

import copy
import json
import statistics
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
NEEDS = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "openvino": "openvino"}  # skipped if absent


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


def serve_inductor(dtype: str) -> None:
    """Child process: torch.compile's own backend."""
    torch._dynamo.config.recompile_limit = 256
    before, start = resident_bytes(), time.perf_counter()
    model, _ = load_pretrained(dtype=getattr(torch, dtype))
    compiled = torch.compile(model, dynamic=True)

    def time_one(prompt: np.ndarray, new: int) -> tuple[float, float]:
        first, further = time_text(compiled, torch.from_numpy(prompt)[None], new)
        return first, statistics.mean(further)

    answer(time_one, before, time.perf_counter() - start)


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


def build(work: Path, calibration: str | None, console: Console) -> dict[str, tuple[str, str]]:
    """The engines: label -> (function of a child process, its argument)."""
    missing = {package for module, package in NEEDS.items() if util.find_spec(module) is None}
    for package in sorted(missing):
        console.print(f"skipped, not installed: {package}")
    model, tokenizer = load_pretrained()
    found = {"torch.compile, bfloat16": ("engines_cpu.serve_inductor", "bfloat16")}
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    last = "prune_lm_head=true"  # as in all others: logits of the last token only
    for precision, options in (("fp32", [last]), ("int4", [last, "accuracy_level=4", "block_size=128"])):
        if (refused := run_builder(work / "model", work / precision, precision, options)) is not None:
            console.print(f"skipped: model builder, {precision}: {refused}")
        else:
            found[f"GenAI, {precision}"] = ("onnx_cpu.serve", str(work / precision))
    if not missing & {"gguf", "llama-cpp-python"}:
        write_gguf(model, tokenizer, work / "model.gguf")
        found["llama.cpp, Q4_0"] = ("engines_cpu.serve_llama_cpp", str(work / "model.gguf"))
    data = batches(tokenizer, calibration, count=64)
    if "openvino" not in missing:
        out, small = work / "standard", copy.deepcopy(model)
        qcompile.quantize(small, "int4-cpu", data)  # in groups of 32: OpenVINO wants them to divide the columns
        qcompile.export_onnx(small, out, tokenizer=tokenizer, contrib_ops=False, low_memory=True, last_logits=True)
        found["OpenVINO, qcompile's standard operators"] = ("engines_cpu.serve_openvino", str(out / "model.onnx"))
    qcompile.quantize(model, BEST, data)
    qcompile.export_onnx(model, work / "ours", tokenizer=tokenizer, last_logits=True, chunk=CHUNK)
    found[f"qcompile {BEST}, last logits, chunks"] = ("onnx_cpu.serve", str(work / "ours"))
    return found


def main() -> None:
    """Build, measure, print, write."""
    need_genai()
    console, rows = Console(width=120), []
    with tempfile.TemporaryDirectory() as place:
        engines = build(Path(place), next(iter(sys.argv[1:]), None), console)
        times: dict[str, list[list[float]]] = {}
        for _ in range(PROCESSES):
            children = {}
            for name, (function, given) in engines.items():
                try:
                    children[name] = Child(given, function)
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
    table = Table("engine", f"prefill of {PROMPT}, tokens/s", "decode, tokens/s", "open MB")
    for name, found in times.items():
        first, further, memory = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append(dict(engine=name, prefill=PROMPT / first, decode=1 / further, memory_megabytes=memory / 1e6))
        table.add_row(name, f"{PROMPT / first:.0f}", f"{1 / further:.1f}", f"{memory / 1e6:.0f}")
    console.print(table)
    present = ["onnxruntime-genai", *(package for module, package in NEEDS.items() if util.find_spec(module))]
    peers = {package: metadata.version(package) for package in present}
    found = dict(
        versions={**versions(), **peers}, prompt=PROMPT, new=NEW, processes=PROCESSES, rounds=ROUNDS, rows=rows
    )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
