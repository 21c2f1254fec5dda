"""What only a GPU can show: compiled models on one, with and without CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

import qcompile
from qcompile import backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("recipe", ["int8", "w4a16", "w4a8", "fp8", "int8-rotated"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
def test_compiled_models(name, recipe):
    model = build(name).bfloat16().cuda()
    batch = {key: value.cuda() for key, value in example(name).items()}
    with torch.no_grad():
        plain = model(**batch)[0].float()
        got = torch.compile(model, backend="qcompile", options={"recipe": recipe})(**batch)[0].float()
        qcompile.quantize(model, recipe, progress=False)
        want = model(**batch)[0].float()
    assert float((got - want).norm()) <= max(1e-2 * float(want.norm()), 1.5 * float((want - plain).norm()))
    kernels = {label for site in backend.reports[-1].sites for label in (site.kernel or {}).values()}
    assert kernels and not any("dequantize, then" in kernel for kernel in kernels)


@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
def test_cuda_graphs_give_the_same(recipe):
    model = build("llama").bfloat16().cuda()
    ids = torch.randint(3, 128, (2, 9), device="cuda")
    plain = torch.compile(model, backend="qcompile", options={"recipe": recipe})
    options = {"recipe": recipe, "inductor": {"triton.cudagraphs": True}}
    graphs = torch.compile(model, backend="qcompile", options=options)
    with torch.no_grad():
        want = plain(ids).logits
        for _ in range(4):  # warm up, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(graphs(ids).logits, want)


def test_generate():
    model = build("llama").bfloat16().cuda()
    ids = torch.tensor([[5, 9, 17, 33]], device="cuda")
    how = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    quantized = build("llama").bfloat16().cuda()
    qcompile.quantize(quantized, "w8a16", progress=False)
    want = quantized.generate(ids, **how)
    model.forward = torch.compile(model.forward, backend="qcompile", options={"recipe": "w8a16"}, dynamic=True)
    assert torch.equal(model.generate(ids, **how)[:, :6], want[:, :6])
