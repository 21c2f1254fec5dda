"""Generate text on a CPU: a compiled prefill, a compiled decode step, and transformers' own generate() in front.

python examples/generate_text.py [MODEL] [PROMPT]
"""

import sys
import time

import torch
from transformers import TextStreamer

import qcompile
from qcompile.generation.pretrained import load_pretrained

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
prompt = sys.argv[2] if len(sys.argv) > 2 else "The sea is"

model, tokenizer = load_pretrained(name, torch.bfloat16)
print(qcompile.compile_for_generate(model, "w4a8"))

inputs = tokenizer(prompt, return_tensors="pt")
model.generate(**inputs, max_new_tokens=4)  # compiles the prefill
start = time.perf_counter()
tokens = model.generate(**inputs, max_new_tokens=64, streamer=TextStreamer(tokenizer), do_sample=True, top_p=0.9)
new = tokens.shape[1] - inputs["input_ids"].shape[1]
print(f"{new / (time.perf_counter() - start):.0f} tokens/s")
