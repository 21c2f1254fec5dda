"""One quantization for vLLM, SGLang and transformers: a compressed-tensors folder, opened by transformers itself.

python examples/export_to_servers.py [MODEL] [FOLDER]
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import qcompile
from qcompile.generation.pretrained import load_pretrained

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
folder = sys.argv[2] if len(sys.argv) > 2 else "smollm2-vllm"

model, tokenizer = load_pretrained(name, torch.bfloat16)
batches = qcompile.calibration_batches(tokenizer, count=16)
qcompile.quantize(model, "serve-w4a16", batches)
qcompile.export(model, folder, to="vllm", tokenizer=tokenizer)
print(f"written: {folder}; serve it by: vllm serve {folder}")

again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
inputs = tokenizer("The sea is", return_tensors="pt")
with torch.no_grad():
    difference = (again(**inputs).logits - model.float()(**inputs).logits).abs().max()
print(f"largest difference of a logit in transformers: {difference:.1e}")
