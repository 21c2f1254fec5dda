"""What only a GPU can show: compiled models on one, with and without CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from zoo import build, example

import qcompile
from qcompile.backend import dynamo as backend
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.codegen.triton.tuning.gpu_timer import TimedGpu
from qcompile.memory.fingerprint import fingerprint
from qcompile.numerics import code_rounding
from qcompile.numerics.code_matmul import code_matmul
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import QGaLore

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


CALIBRATED = ["w4a4-groups", "w4a4-rrs", "w4a4-rrs-sequence", "w4a8-dgq", "w4a8kv4", "w4a8kv4-qoq"]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*(("llama", recipe) for recipe in (*CALIBRATED, "fp4-fp8", "kv8", "kv4-hadamard"))]
    + [("mixtral", recipe) for recipe in ("int8", "fp8", "w4a16", "w4a8")],
)
def test_quantized_models_are_compiled(name, recipe):
    """Kernels of a group, of dual-grained weights, of fp4 with fp8, of quantized caches and of experts."""
    model = build(name).bfloat16().cuda()
    batch = {key: value.cuda() for key, value in example(name).items()}
    with torch.no_grad():
        plain = model(**batch)[0].float()
        qcompile.quantize(model, recipe, [batch], progress=False)
        want = model(**batch)[0].float()
        got = torch.compile(model, backend="qcompile")(**batch)[0].float()
    assert float((got - want).norm()) <= max(1e-2 * float(want.norm()), 1.5 * float((want - plain).norm()))
    kernels = {label for site in backend.reports[-1].sites for label in (site.kernel or {}).values()}
    assert kernels and not any("dequantize, then" in kernel for kernel in kernels)


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"inductor": {"triton.cudagraphs": True}}])
@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
def test_cuda_graphs_give_the_same(recipe, options):
    model = build("llama").bfloat16().cuda()
    ids = torch.randint(3, 128, (2, 9), device="cuda")
    plain = torch.compile(model, backend="qcompile", options={"recipe": recipe})
    graphs = torch.compile(model, backend="qcompile", options={"recipe": recipe, **options})
    with torch.no_grad():
        want = plain(ids).logits
        for _ in range(4):  # warm up, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(graphs(ids).logits, want)


def test_generate():
    model = build("llama").bfloat16().cuda()
    ids = torch.tensor([[5, 9, 17, 33]], device="cuda")
    config = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    quantized = build("llama").bfloat16().cuda()
    qcompile.quantize(quantized, "w8a16", progress=False)
    want = quantized.generate(ids, **config)
    model.forward = torch.compile(model.forward, backend="qcompile", options={"recipe": "w8a16"}, dynamic=True)
    assert torch.equal(model.generate(ids, **config)[:, :6], want[:, :6])


@pytest.mark.parametrize("form", ["int4/group128/zero", "int3/group64/zero", "int2/group64", "int8/row"])
def test_weights_are_prepared_on_the_gpu_as_on_a_cpu(form):
    form = Format.parse(form)
    q = quantize_tensor(torch.randn(300, 500), form)
    parts = q.stored_parts
    want = prepare(*parts, form, 500, torch.bfloat16)
    got = prepare(*[None if part is None else part.cuda() for part in parts], form, 500, torch.bfloat16)
    assert all(torch.equal(a.cpu(), b) and a.is_cuda for a, b in zip(got, want, strict=True) if a is not None)


@pytest.mark.parametrize("shape", [(3, 5), (4097, 4099)])
def test_fingerprints_are_those_of_a_cpu(shape):
    tensor = torch.randn(shape).bfloat16()
    assert fingerprint(tensor.cuda()) == fingerprint(tensor).removesuffix("cpu") + "cuda:0"


@pytest.mark.parametrize("name", ["int4-train", "q-galore"])
def test_training_rounds_by_kernels(name):
    model = build("llama").cuda().requires_grad_(True)
    batch = {key: value.cuda() for key, value in example("llama").items()}
    recipe = qcompile.Recipe("small", (QGaLore(rank=8),)) if name == "q-galore" else name
    qcompile.train(model, recipe, example=batch, progress=False)
    assert type(code_rounding._installed["cuda"]).__name__ == "GpuRounding"
    kind = qcompile.optim.QGaLoreAdamW8bit if name == "q-galore" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (5, 7, 3), (17, 9, 33), (32, 8, 8), (100, 200, 131_071)])
def test_integer_products_of_any_size(m, n, k):
    x, w = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    want = code_matmul(x, w)
    for a, b in ((x, w), (x.t().contiguous().t(), w.t().contiguous().t())):
        assert torch.equal(code_matmul(a.cuda(), b.cuda()).cpu().long(), want.long())


def test_readings_are_of_the_gpu():
    timed_gpu = TimedGpu()
    x = torch.randn(512, 512, device=timed_gpu.device)
    once = timed_gpu.timer(lambda i: x @ x, 2)
    assert once() > 0 and timed_gpu.l2_bytes > 2**20 and "clocks" in timed_gpu.state()
