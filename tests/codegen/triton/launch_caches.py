"""Launches kernels of 4-bit weights by int8, and of KV caches, through Triton's JIT on a GPU that is not there.

python launch_caches.py ARCHITECTURE      writes what was launched, as JSON; in a process of its own, not interpreted
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import fake_driver
import torch

fake = fake_driver.install(int(sys.argv[1]))

from qcompile.codegen.triton.kernels.gpu import Gpu  # noqa: E402  after the driver
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of  # noqa: E402
from qcompile.codegen.triton.launch import kv_attention, w4a8  # noqa: E402
from qcompile.codegen.triton.launch.gemm import Epilogue  # noqa: E402
from qcompile.numerics.format import Format  # noqa: E402
from qcompile.numerics.kv_words import cache_shapes  # noqa: E402

found = Gpu("fake", fake.multiprocessors, (fake.architecture // 10, fake.architecture % 10))
w4a8.gpu = kv_attention.gpu = lambda device: found

for text, k in (("int4/group128/zero/dual", 128), ("int4/group32/dual", 4096), ("int4/row/zero", 4100)):
    form, n = Format.parse(text), 256
    layout = byte_layout_of(form)
    blocks = -(-k // layout.block)
    groups = blocks * layout.block // layout.group if layout.group else 1
    packed, steps = torch.zeros(n, blocks * layout.chunk, dtype=torch.uint8), torch.zeros(groups, n, dtype=torch.int32)
    weight = w4a8.ByteWeight(packed, steps, torch.ones(n, 1), layout, k)
    for m in (1, 16, 70):
        x, added = torch.zeros(m, k, dtype=torch.int8), Epilogue(residual=torch.zeros(m, n).bfloat16())
        for split_k in (1, 2):
            w4a8.linear_w4a8(x, torch.ones(m), weight, added, torch.bfloat16, split_k)

for bits, width, heads, positions in ((4, 128, 4, 1), (4, 64, 1, 1), (8, 128, 3, 2), (4, 128, 16, 1)):
    keys, values, scales = cache_shapes(1, 1, width, 1024, bits)
    buffers = [torch.zeros(s, dtype=t) for s, t in (
        (keys, torch.int16), (scales, torch.int32), (values, torch.int16), (scales, torch.int32))]  # fmt: skip
    cache = kv_attention.KVBuffers(*buffers, torch.tensor(5), bits)
    for tokens in (1, 7, 16):
        new = torch.zeros(1, 1, tokens, width).bfloat16()
        kv_attention.write_tokens(cache, new, new)
    kv_attention.read_tokens(cache, torch.bfloat16)
    query, mask = torch.zeros(1, heads, positions, width).bfloat16(), torch.zeros(1, positions, 1024)
    for settings in ({}, dict(window=1), dict(window=100, cap=30.0), dict(splits=1), dict(mask=mask)):
        kv_attention.attend(query, cache, 0.1, **settings)

print(json.dumps([asdict(one) for one in fake.launches]))
