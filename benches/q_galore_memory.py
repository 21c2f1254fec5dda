"""Peak memory of training by each variant of q_galore_variants.py, each in a process of its own; Linux only.

    python benches/q_galore.py --only memory [kind ..] [--reference DIR]

All bytes are resident memory of the process. It first trains a tiny model of the same kind, so that libraries, kernels
and threads are there; then a model is built (for Q-GaLore: in int8 already) with its optimizer, and trained on batches
of 128 tokens, so that weights, moments and gradients outweigh activations.

Each variant runs twice. The C library's malloc keeps freed blocks of up to 32 MB in a heap that fills with holes, so
most of a peak may be memory that nothing uses; with MALLOC_MMAP_THRESHOLD_ every block of 1 MB goes back when it is
freed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from q_galore_variants import build, one_step

from qcompile.memory.process import measure_peak, release_freed_memory, resident_bytes

HIDDEN, STEPS, LR = 768, 4, 0.001
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
KINDS = ("adamw", "bitsandbytes", "galore_torch", "ours-galore", "reference", "ours", "ours-bitsandbytes")


def measure(kind: str, hidden: int = HIDDEN, reference: str | None = None) -> dict[str, int]:
    """Train in this process.

    Args:
        kind: of q_galore_variants.KINDS.
        hidden: size of the model; ranks are a quarter of it, at least 32.
        reference: checkout of VITA-Group/Q-GaLore.

    Returns:
        Bytes: `built`, what the built model holds above the same process without it; `first`, the peak of the first
        step, which finds every basis, above the built model; `later`, that of the steps after it, above the built model
        too; `peak`, the most of both above the process without a model; `float`, the size of the model's weights in
        float32.

    Raises:
        ImportError: a peer is not there.
        OSError: the system has no /proc.
    """
    torch.set_num_threads(1)
    _train_tiny(kind, reference)
    release_freed_memory()
    start = resident_bytes()
    variant = build(kind, LR, hidden, reference)
    release_freed_memory()
    built = resident_bytes()
    with measure_peak() as first:
        one_step(variant, 0, rows=1)
    with measure_peak() as later:
        between = resident_bytes()  # what `later` counts from
        for step in range(1, STEPS):
            one_step(variant, step, rows=1)
    peaks = {"first": first.bytes, "later": between + later.bytes - built}
    whole = dict(built=built - start, **peaks, peak=built - start + max(peaks.values()))
    return whole | {"float": _float_bytes(hidden)}


def in_own_processes(kind: str, hidden: int = HIDDEN, reference: str | None = None) -> dict[str, dict[str, int]]:
    """`measure` in processes of its own: "default", and "returned" with freed blocks given back.

    Raises:
        ImportError: a peer is not there.
        RuntimeError: the process failed, with the end of what it wrote.
    """
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import q_galore_memory as m; "
    script += f"m.print_one({kind!r}, {hidden}, {reference!r})"
    rows = {}
    for name, more in (("default", {}), ("returned", RETURNED)):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **more}
        )
        if done.returncode:
            raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "missing" in found:
            raise ImportError(found["missing"])
        rows[name] = found
    return rows


def print_one(kind: str, hidden: int, reference: str | None) -> None:
    """What `in_own_processes` reads: one line of JSON."""
    warnings.simplefilter("ignore")
    try:
        print(json.dumps(measure(kind, hidden, reference)))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))


def _train_tiny(kind: str, reference: str | None) -> None:
    variant = build(kind, LR, 128, reference)
    for step in range(2):
        one_step(variant, step, rows=1)


def _float_bytes(hidden: int) -> int:
    from q_galore_variants import decoder

    with torch.device("meta"):
        return sum(parameter.nbytes for parameter in decoder(hidden).parameters())
