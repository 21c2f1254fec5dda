"""What checking a checkpoint costs: hashes that Python brings along, against reading a file.

    python benches/checkpoint_digests.py     writes benches/results/checkpoint_digests.json

GB per second of CPU time, so that other work of the machine does not count: each hash over 256 MiB, and reading a file
of that size from the page cache; each the best of three.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from qcompile.memory.environment import versions

RESULTS = Path(__file__).parent / "results" / "checkpoint_digests.json"
BYTES = 2**28


def seconds(call: Callable[[], object]) -> float:
    """CPU time of a call on all threads, the best of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Measure, print, write."""
    tensor = torch.randint(0, 256, (BYTES,), dtype=torch.uint8)
    data = tensor.numpy()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"x": tensor}, path)
        speeds = {"crc32": seconds(lambda: zlib.crc32(data)), "adler32": seconds(lambda: zlib.adler32(data))}
        speeds |= {name: seconds(lambda name=name: hashlib.new(name, data)) for name in ("blake2b", "sha256", "md5")}
        speeds |= {"read, page cache": seconds(path.read_bytes)}
    rows = [dict(what=name, gb_per_second=BYTES / 1e9 / value) for name, value in speeds.items()]
    print(json.dumps(rows, indent=1))
    RESULTS.write_text(json.dumps(dict(versions=versions(), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
