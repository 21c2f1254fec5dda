"""A file's tensors by type, against a file whose types are known."""

from __future__ import annotations

import gguf
import numpy as np

from qcompile.checkpoint.writers.gguf_summary import quantized_types, stored_types


def test_types_are_counted_with_their_bits(tmp_path):
    path, writer = tmp_path / "some.gguf", gguf.GGUFWriter(str(tmp_path / "some.gguf"), "llama")
    table = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    writer.add_tensor("a.weight", gguf.quants.quantize(table, gguf.GGMLQuantizationType.Q4_0), raw_dtype=2)
    writer.add_tensor("b.weight", gguf.quants.quantize(table[:32], gguf.GGMLQuantizationType.Q4_0), raw_dtype=2)
    writer.add_tensor("c.weight", table.astype(np.float16))
    writer.add_tensor("d.weight", table[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = {row.name: (row.tensors, row.values, row.nbytes, row.bits) for row in stored_types(path)}
    assert rows == {
        "F16": (1, 4096, 8192, 16.0), "Q4_0": (2, 6144, 3456, 4.5), "F32": (1, 64, 256, 32.0),
    }  # fmt: skip
    assert [row.name for row in stored_types(path)] == ["F16", "Q4_0", "F32"], "the largest first"
    assert quantized_types(path) == ["Q4_0"]
