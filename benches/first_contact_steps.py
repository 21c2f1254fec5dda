"""The measuring steps of first_contact.py, each in a process of its own; findings are lines of JSON.

python benches/first_contact_steps.py machine
python benches/first_contact_steps.py gemm 4096x4096
python benches/first_contact_steps.py model w4a16
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu as model_bench
import gpu_model
import torch

import qcompile.backend
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.row_quant import row_quant
from qcompile.codegen.triton.tuning.gemm_benchmark import compare_gemms, interleaved
from qcompile.codegen.triton.tuning.gpu_timer import TimedGpu

M_OF_A_FIRST_LOOK = [1, 4, 16, 64, 128, 256, 512, 2048]
LAYERS, BATCHES, PROMPT, CALLS = 4, (1, 16), 2048, 20


def say(**finding: Any) -> None:
    """One finding."""
    print(json.dumps(finding), flush=True)


def machine() -> None:
    """Versions, clocks, and what the card moves and multiplies: the ceilings of everything after."""
    timed = TimedGpu()
    say(**timed.state())
    source = torch.empty(2**30, dtype=torch.uint8, device=timed.device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": (timed.timer(lambda i: target.copy_(source), 2), 2 * source.nbytes)}, 10)["copy"]
    a = torch.randn(8192, 8192, device=timed.device).bfloat16()
    matmul = interleaved({"matmul": (timed.timer(lambda i: a @ a, 2), 0)}, 5)["matmul"]
    say(copy_terabytes_a_second=round(copy.bandwidth / 1e12, 3), spread=round(copy.spread, 3))
    say(bf16_teraflops=round(2 * 8192**3 / matmul.microseconds / 1e6, 1), spread=round(matmul.spread, 3))


def gemm(shape: str) -> None:
    """Every kernel and baseline on one shape, beside what the model predicts of it."""
    k, n = map(int, shape.split("x"))
    timed = TimedGpu()
    card = "H200" if "H200" in timed.gpu.name else "H100"
    found = compare_gemms([(k, n)], M_OF_A_FIRST_LOOK, rounds=6, timed_gpu=timed, seconds=45)
    for row in found.rows:
        for name, one in row.times.items():
            kernel = name.removeprefix("qcompile ")
            finding: dict[str, Any] = dict(m=row.m, name=name, microseconds=round(one.microseconds, 2),
                                           spread=round(one.spread, 3), times_cublas=row.ratio(name))  # fmt: skip
            if kernel in gpu_model.KERNELS:
                predicted = gpu_model.predicted(kernel, row.m, k, n, gpu_model.CARDS[card])
                finding |= dict(predicted=round(1e6 * predicted.seconds, 2), bound=predicted.bound)
            say(**finding)
        for name, why in row.absent.items():
            say(m=row.m, name=name, absent=why)


def rows() -> None:
    """row_quant by the bytes that it moves."""
    timed = TimedGpu()
    for m, k, fields in (
        (1, 4096, {}),
        (16, 4096, dict(first="rms", residual=True)),
        (2048, 14336, dict(first="gate")),
    ):
        x, gain = torch.randn(m, k, device=timed.device).bfloat16(), torch.ones(k, device=timed.device)
        spec = RowQuant("bf16", **fields)
        operands = dict(gate=x) if spec.first == "gate" else dict(residual=x, gain=gain) if spec.residual else {}

        def call(i: int, x: Any = x, spec: Any = spec, operands: Any = operands) -> Any:
            return row_quant(spec, x, 1e-6, **operands)[0]

        nbytes = m * k * (2 * (1 + len(operands)) + 1)
        one = interleaved({"row_quant": (timed.timer(call, 4), nbytes)}, 6)["row_quant"]
        say(kernel=str(spec), m=m, k=k, microseconds=round(one.microseconds, 2),
            terabytes_a_second=round(one.bandwidth / 1e12, 3))  # fmt: skip


def attention() -> None:
    """kv_decode over 4 and 8 bits beside SDPA in bfloat16 over the same tokens: batch 8, 8 heads for 32 queries."""
    from qcompile.codegen.triton.launch.kv_attention import KVBuffers, attend
    from qcompile.modules.static_kv_cache import StaticQuantizedLayer

    timed, sdpa = TimedGpu(), torch.nn.functional.scaled_dot_product_attention
    batch, heads, shared, width = 8, 8, 4, 128
    for tokens in (4096, 16384):
        keys, values = (torch.randn(batch, heads, tokens, width, device=timed.device).bfloat16() for _ in range(2))
        query = torch.randn(batch, heads * shared, 1, width, device=timed.device).bfloat16()
        exact = sdpa(query.float(), keys.float(), values.float(), enable_gqa=True)

        def plain(i: int, q: Any = query, k: Any = keys, v: Any = values) -> Any:
            return sdpa(q, k, v, enable_gqa=True)

        timers = {"SDPA bf16": (timed.timer(plain, 2), 2 * keys.nbytes)}
        for bits, most in ((4, 0.2), (8, 0.02)):
            layer = StaticQuantizedLayer(tokens, bits)
            layer.update(keys, values)
            cache = KVBuffers(
                layer.keys, layer.key_scales, layer.values, layer.value_scales, layer.cumulative_length, bits
            )

            def ours(i: int, q: Any = query, cache: Any = cache) -> Any:
                return attend(q, cache, width**-0.5)

            error = float((ours(0).float() - exact).norm() / exact.norm())
            say(name=f"kv_decode {bits} bits", tokens=tokens, error=round(error, 4), ok=error < most)
            timers[f"kv_decode {bits} bits"] = (timed.timer(ours, 2), sum(t.nbytes for t in layer.buffers))
        for name, one in interleaved(timers, 6).items():
            say(name=name, tokens=tokens, microseconds=round(one.microseconds, 2),
                terabytes_a_second=round(one.bandwidth / 1e12, 3))  # fmt: skip


def compiled(candidate: str, model: Any, **options: Any) -> Any:
    """The model, compiled with CUDA graphs."""
    if candidate == "inductor":
        return torch.compile(model, mode="reduce-overhead")
    settings = {"recipe": candidate, "verify": False, "mode": "reduce-overhead", **options}
    return torch.compile(model, backend=qcompile.backend.qcompile, options=settings)


def model(candidate: str) -> None:
    """Four layers of Llama-3-8B shapes and the head: tokens a second, launches, and whether there was a CUDA graph."""
    from torch._dynamo.utils import counters

    device = torch.device("cuda", 0)
    plain = model_bench.model_of(LAYERS, device)
    network = compiled(candidate, plain)
    work: list[tuple[str, int, Callable[[], Any]]] = [
        (f"decode, batch {batch}", batch, model_bench.decoding(network, plain.config, batch, device))
        for batch in BATCHES
    ]
    work.append(
        (
            f"prompt of {PROMPT}",
            PROMPT,
        )
    )
    for name, tokens, call in work:
        start = time.monotonic()
        for _ in range(model_bench.WARMUP_CALLS):
            call()
        once = model_bench.microseconds(call, CALLS, device)
        microseconds = min(once() for _ in range(3))
        skips = counters["inductor"]["cudagraph_skips"]
        say(work=name, candidate=candidate, microseconds=round(microseconds, 1), ok=skips == 0, cudagraph_skips=skips,
            tokens_a_second=round(tokens / microseconds * 1e6, 1), compile_seconds=round(time.monotonic() - start, 1),
            kernels=launches_of(call))  # fmt: skip


def launches_of(call: Callable[[], Any]) -> int:
    """Kernels that one call runs on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def graphs(recipe: str) -> None:
    """A recipe with constants of its own (rotations) replayed from CUDA graphs: the same logits every time."""
    device = torch.device("cuda", 0)
    plain = model_bench.model_of(2, device)
    network = compiled(recipe, plain)
    ids = torch.randint(0, 100, (2, 16), device=device)
    with torch.no_grad():
        want = network(ids, use_cache=False).logits.clone()
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            same = torch.equal(network(ids, use_cache=False).logits, want)
    say(recipe=recipe, ok=same)


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (machine, gemm, rows, attention, model, graphs)
}


def main() -> None:
    """Run one step."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in STEPS:
        raise SystemExit(f"no step {name!r}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU here: nothing was measured")
    STEPS[name](*arguments)


if __name__ == "__main__":
    main()
