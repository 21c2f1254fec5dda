"""Any PyTorch module through torch.compile(backend="qcompile"): no calibration, weights stay as they are.

python examples/compile_model.py [WIDTH]
"""

import sys
import time

import torch
from torch import nn

width = int(sys.argv[1]) if len(sys.argv) > 1 else 2048

model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).bfloat16().eval()
x = torch.randn(8, width, dtype=torch.bfloat16)


def milliseconds(call, runs=30):
    """The median time of a call."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[runs // 2]


with torch.no_grad():
    plain, fast = torch.compile(model), torch.compile(model, backend="qcompile", options={"recipe": "int8"})
    expected, got = plain(x), fast(x)  # compiles
    error = (got - expected).float().norm() / expected.float().norm()
    print(f"Inductor {milliseconds(plain):.2f} ms, qcompile {milliseconds(fast):.2f} ms, relative error {error:.4f}")
