"""What a user does first, in an environment that has the wheel and its extras only; run by `make test-dist`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from torch import nn

import qcompile

assert "site-packages" in qcompile.__file__, f"{qcompile.__file__} is not the installed wheel"
command = Path(sys.executable).with_name("qcompile")
assert "qcompile" in subprocess.check_output([command, "--version"], text=True)
assert "int8" in subprocess.check_output([command, "recipes"], text=True)

torch.manual_seed(0)
net, x = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)).eval(), torch.randn(8, 256)
with torch.no_grad():
    expected = net(x)
    compiled = torch.compile(net, backend="qcompile", options={"on_slow_kernel": "quantize"})(x)
    assert (compiled - expected).norm() < 0.03 * expected.norm()

config = transformers.LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
)
model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(9)[None]
report = qcompile.quantize(model, "w4a16", progress=False)
qcompile.save(model, "saved")
again = qcompile.load("saved", transformers.LlamaForCausalLM(config).eval())
assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
qcompile.export_onnx(model, "onnx", progress=False)
assert (Path("onnx") / "model.onnx").is_file()
for folder in ("saved", "onnx"):
    shutil.rmtree(folder)
sites = len(report.sites)
print(f"torch-qcompile {qcompile.__version__} from a wheel: compiles, quantizes {sites} sites, saves, exports")
