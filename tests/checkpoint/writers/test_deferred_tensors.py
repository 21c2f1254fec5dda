"""Linears whose codes lie in files are written without holding them: the same bytes, and nothing is read before."""

from __future__ import annotations

import functools

import pytest
import torch
from served_models import FLOAT_LOGITS, decoder, quantized, recipe, write_template
from zoo import build, example

import qcompile
from qcompile.checkpoint import stored_files
from qcompile.checkpoint.writers.awq_layout import awq_layout
from qcompile.checkpoint.writers.compressed_tensors_layout import compressed_layout
from qcompile.checkpoint.writers.deferred_tensors import deferred
from qcompile.checkpoint.writers.gptq_layout import gptq_layout
from qcompile.memory.stored_tensor import StoredTensor
from qcompile.modules.quant_linear import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor

LAYOUTS = {
    "gptq": ("int4/group32/bf16", lambda model: gptq_layout(model).tensors),
    "gptq, zero points": ("int4/group32/zero/bf16", lambda model: gptq_layout(model).tensors),
    "awq": ("int4/group32/zero/bf16", lambda model: awq_layout(model).tensors),
    "compressed": ("int4/group32/zero/bf16", lambda model: compressed_layout(model)[0]),
    "compressed, 8 bits": ("int8/row/bf16", lambda model: compressed_layout(model)[0]),
}


@pytest.fixture
def reads(monkeypatch):
    """Which tensors were read; none is too small to stay in its file."""
    found, read = [], stored_files.read_part
    monkeypatch.setattr(stored_files.stored_tensors, "__defaults__", (0,))
    monkeypatch.setattr(stored_files, "read_part", lambda *args: found.append(args) or read(*args))
    return found


def in_parts(model, folder):
    qcompile.save(model, folder)
    return qcompile.load(folder, stream=True)


def same(found, want):
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_computed_when_it_is_read(tmp_path, reads, layout):
    form, layout_of = LAYOUTS[layout]
    model = quantized(form, dtype=torch.bfloat16)
    parts = in_parts(model, tmp_path / "q")
    reads.clear()
    found = layout_of(parts)
    assert not reads
    assert sum(isinstance(tensor, StoredTensor) for tensor in found.values()) >= 2 * 7
    same(found, layout_of(model))


def test_experts_too(tmp_path, reads):
    model = build("mixtral")
    qcompile.quantize(model, recipe("int4/group32", rules=FLOAT_LOGITS), example=example("mixtral"), progress=False)
    parts = in_parts(model, tmp_path / "q")
    reads.clear()
    found = compressed_layout(parts)[0]
    assert not reads and any(".experts.1." in name and isinstance(t, StoredTensor) for name, t in found.items())
    same(found, compressed_layout(model)[0])


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq", "gguf"])
def test_files_have_the_same_bytes(tmp_path, reads, to):
    form = "int4/group32/f16" if to == "gguf" else "int4/group32/zero/bf16"
    model = quantized(form, **({} if to == "gguf" else {"dtype": torch.bfloat16}))
    options = {"template": write_template(decoder(), tmp_path / "float.gguf")} if to == "gguf" else {}
    parts = in_parts(model, tmp_path / "q")
    for name, source in (("whole", model), ("parts", parts)):
        qcompile.export(source, tmp_path / name / "model", to=to, progress=False, **options)
    files = [file for file in (tmp_path / "whole").rglob("*") if file.suffix in (".safetensors", ".gguf", ".json")]
    assert files
    for file in files:
        other = tmp_path / "parts" / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes(), file.name


def test_what_depends_on_no_stored_tensor_is_there_at_once():
    q = quantize_tensor(torch.randn(8, 64), Format.parse("int8/row"))
    linear = QuantLinear(64, 8, q.format, None, dict(zip(PARTS, q.stored_parts, strict=True)))
    calls = []

    def compute(linear):
        calls.append(linear)
        return {"twice": linear.codes.int() * 2, "size": torch.tensor([8, 64])}

    plain = deferred(compute, linear)
    assert len(calls) == 1 and not any(isinstance(tensor, StoredTensor) for tensor in plain.values())
    codes = linear.codes
    linear.codes = StoredTensor(torch.empty_like(codes, device="meta"), functools.partial(torch.clone, codes))
    found = deferred(compute, linear)
    assert isinstance(found["twice"], StoredTensor) and type(found["size"]) is torch.Tensor
    assert linear.codes is not codes and isinstance(linear.codes, StoredTensor)
    same(found, plain)
