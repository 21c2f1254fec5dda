"""Attention over an int8 KV cache in ONNX Runtime: a prompt read at once, in four pieces and in eight.

    python benches/onnx_long_prompts.py      writes benches/results/onnx_long_prompts-ISA.json (as onnx_cpu.py)

SmolLM2's attention (9 heads of 64, 3 key/value heads), interleaved, medians. The lengths at which
codegen/onnx/lowering/int8_kv_attention.py splits a prompt come from here.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import NameFixPass
from rich.table import Table

from qcompile.cli.output import print_table
from qcompile.codegen.onnx.lowering import int8_kv_attention
from qcompile.codegen.onnx.lowering.constants import Constants
from qcompile.codegen.onnx.lowering.int8_kv_attention import ChunkedPrefill, insert_lengths, split_by_length
from qcompile.codegen.onnx.lowering.op_inputs import CONTRIB, GroupQueryAttention
from qcompile.memory.environment import versions
from qcompile.numerics.int8_matmul import processor

RESULTS = Path(__file__).parent / "results" / f"onnx_long_prompts-{processor()}.json"
HEADS, GROUPS, SIZE, ROUNDS = 9, 3, 64, 15
SIZES = [(new, 0) for new in (128, 192, 256, 512, 1024, 1536, 2048, 4096)]
SIZES += [(256, 256), (256, 512), (512, 256), (512, 512)]  # new tokens, and cached ones


def attention(chunks: int, max_tokens: int) -> onnxruntime.InferenceSession:
    """The attention, whatever the past, in so many chunks up to so many tokens."""
    floats, codes, ints, cache = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, [1, GROUPS, None, SIZE]
    inputs = [ir.val("ids", ir.DataType.INT64, [1, None]), ir.val("last", ints, [1]), ir.val("total", ints, [1])]
    inputs += [ir.val(name, floats, [1, None, n * SIZE]) for name, n in (("q", HEADS), ("k", GROUPS), ("v", GROUPS))]
    inputs += [ir.val("keys", codes, cache), ir.val("values", codes, cache)]
    outputs = [ir.val("attended", floats), ir.val("new_keys", codes), ir.val("new_values", codes)]
    graph = ir.Graph(inputs, outputs[:2], nodes=[], name="attention", opset_imports={"": 21, CONTRIB: 1})
    constants, rng = Constants(graph), np.random.default_rng(0)
    angles = rng.standard_normal((8192, SIZE // 2)).astype(np.float32)
    cos, sin = constants.tensor(np.cos(angles)), constants.tensor(np.sin(angles))
    scale = constants.tensor(np.full((1, GROUPS, 1, SIZE), 0.02, np.float32))
    _, last, total, q, k, v, keys, values = inputs
    operands = GroupQueryAttention(q, k, v, keys, values, last, total, cos, sin, None, None, None, scale, scale)
    attributes = dict(num_heads=HEADS, kv_num_heads=GROUPS, do_rotary=1, kv_cache_bit_width=8,
                      k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL")  # fmt: skip
    node = ir.node(
        "GroupQueryAttention", operands.as_list(), attributes, outputs=outputs, domain=CONTRIB, name="attention"
    )
    graph.append(node)
    config = ChunkedPrefill(chunks, min_tokens=0, max_tokens=max_tokens, min_over_past=0)
    with patch.object(int8_kv_attention, "CHUNKED_PREFILL", config):
        split_by_length(node, insert_lengths(node, inputs[0]))
    model = ir.Model(graph, ir_version=10)
    NameFixPass()(model)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def inputs_of(new: int, past: int) -> dict[str, np.ndarray]:
    """Random ones."""
    rng = np.random.default_rng(new + past)
    heads = zip("qkv", (HEADS, GROUPS, GROUPS), strict=True)
    found = {name: rng.standard_normal((1, new, count * SIZE), np.float32) for name, count in heads}
    found |= {n: rng.integers(-99, 99, (1, GROUPS, past, SIZE), dtype=np.int8) for n in ("keys", "values")}
    total = np.array([past + new], np.int32)
    return found | dict(ids=np.zeros((1, new), np.int64), total=total, last=total - 1)


def main() -> None:
    """Measure, compare, print, write."""
    onnxruntime.set_default_logger_severity(3)
    sessions = {"at once": attention(2, 0), "4 pieces": attention(4, 10**6), "8 pieces": attention(8, 10**6)}
    rows = []
    for new, past in SIZES:
        feeds, times, outputs = inputs_of(new, past), {name: list[float]() for name in sessions}, {}
        for step in range(ROUNDS + 1):  # the first warms up
            for name, session in sessions.items():
                start = time.perf_counter()
                outputs[name] = session.run(None, feeds)
                times[name] += [time.perf_counter() - start] * bool(step)
        difference = max(float(np.abs(made[0] - outputs["at once"][0]).max()) for made in outputs.values())
        medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
        rows.append(dict(new=new, past=past, difference=difference, milliseconds=medians))
    table = Table("new tokens", "past", *(f"{name}, ms" for name in sessions), "largest difference")
    for row in rows:
        table.add_row(
            str(row["new"]), str(row["past"]), *(f"{ms:.2f}" for ms in row["milliseconds"].values()),
            f"{row['difference']:.1e}",
        )  # fmt: skip
    print_table(table)
    RESULTS.write_text(json.dumps(dict(versions=versions(), rounds=ROUNDS, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
