"""Compile a language model into one file, and open it without compiling.

python examples/package_model.py [MODEL] [FILE]
"""

import sys
import time
from pathlib import Path

import qcompile
from qcompile.generation.pretrained import load_pretrained

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
file = Path(sys.argv[2] if len(sys.argv) > 2 else "model.pt2")

model, tokenizer = load_pretrained(name)
qcompile.package(model, file, "w4a8", tokenizer=tokenizer)
print(f"written: {file}, {file.stat().st_size / 1e6:.0f} MB")

start = time.perf_counter()
packaged = qcompile.load_package(file)
print(f"opened in {time.perf_counter() - start:.2f} s")
inputs = packaged.tokenizer("The sea is", return_tensors="pt")
print(packaged.tokenizer.decode(packaged.generate(**inputs, max_new_tokens=24)[0]))
