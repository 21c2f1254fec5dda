"""Specs of the kernels of a quantized cache; the assembler that makes bfloat16 of codes; costs in the budget."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from ptx_words import assembler, evaluate

from qcompile.codegen.triton.aot.budget import read
from qcompile.codegen.triton.aot.compile_kernels import ARCHITECTURES, KernelCost, complaints, types_of
from qcompile.codegen.triton.aot.main_loop import LoopCost
from qcompile.codegen.triton.kernels.attention_spec import KVDecode, KVMerge, KVRead, KVWrite
from qcompile.codegen.triton.kernels.parse_spec import parse
from qcompile.codegen.triton.kernels.render import render


@pytest.mark.parametrize(
    "spec",
    [KVDecode(bits=8, heads=6, queries=2, window=True, cap=True), KVMerge("fp16"), KVWrite("fp32", 8, many=True)],
)
def test_a_spec_reads_back(spec):
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text,words",
    [
        ("kv_decode/bf16/width=80", r"heads of 80 channels; there are kernels for \(64, 128, 256\)"),
        ("kv_write/bf16/bits=2", "codes of 4 or 8"),
        ("kv_decode/fp16", "there is kv_decode for bf16"),
        ("kv_decode/bf16/heads=0", "at least one"),
        ("kv_merge/bf16/width=96", "heads of 96 channels"),
        ("kv_decode/bf16/window/masked", "a mask says which tokens"),
    ],
)
def test_what_there_is_no_kernel_for(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_types_and_complaints():
    assert types_of(KVDecode())["out"] == types_of(KVDecode())["mask"] == "*fp32"
    assert types_of(KVWrite("fp16"))["new_keys"] == "*fp16" and types_of(KVRead("fp32"))["read_values"] == "*fp32"
    assert types_of(KVMerge())["out"] == "*bf16"
    cost = KernelCost(100, 0, 20_000, 1000, {}, 0, 4, {})
    assert "body is lost" in complaints(KVDecode(), 90, cost)[0]
    assert complaints(KVDecode(), 90, dataclasses.replace(cost, mma={"mma": 32})) == []  # not wgmma: N is 8


def bfloat16_pair(word):
    return [(half & np.uint64(0xFFFF)).astype(np.uint32).__lshift__(16).view(np.float32) for half in (word, word >> 16)]


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_of_every_word(bits):
    """128 and the code of 4 bits; of a byte 128 and its lower, 2048 and its upper half: sums are exact."""
    source, codes = render(KVDecode(bits=bits)), np.arange(65536, dtype=np.uint64)
    words = codes | codes[::-1] << np.uint64(16)
    for c in range(16 // bits):
        for half, all_codes in enumerate((codes, codes[::-1])):
            code = all_codes >> np.uint64(bits * c) & np.uint64(2**bits - 1)
            low = bfloat16_pair(evaluate(assembler(source, f"plane{c}"), r1=words))[half]
            if bits == 4:
                assert np.array_equal(low, 128 + code.astype(np.float32))
                continue
            high = bfloat16_pair(evaluate(assembler(source, f"upper{c}"), r1=words))[half]
            assert np.array_equal(low + high, 2176 + code.astype(np.float32))
            assert np.array_equal(low, 128 + (code & np.uint64(15)).astype(np.float32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_main_loop_reads_faster_than_memory(architecture):
    """18.6 bytes a cycle and multiprocessor are 4.3 TB/s of 132 at 1.755 GHz. A trip reads 128 tokens, with two words.

    No load of codes waits, and no code is converted: the few conversions of a trip round weights to bfloat16.
    """
    kernels = read()["kernels"][str(architecture)]
    names = [name for name in kernels if name.startswith("kv_decode/")]
    assert len(names) == 8
    for name in names:
        spec, cost = parse(name.split()[0]), kernels[name]
        loop = LoopCost(sum(cost["loop"].values()), cost["loop"], int(re.search(r"(\d+) warps", name)[1]))
        read_bytes = 128 * spec.width * spec.bits // 8 * 2 + 128 * 8
        rate = read_bytes / max(loop.issue, loop.alu, loop.fma)
        assert rate >= (24 if spec.width >= 128 else 22), (name, rate)
        assert not cost["spilled"] and not loop.waited_loads and list(cost["mma"]) == ["mma"]
        assert loop.by_kind.get("convert", 0) <= 8 and loop.by_kind["permute"] <= 24
