"""Export an INT4 ONNX folder, checked against PyTorch before it appears, and decode with it in ONNX Runtime.

python examples/export_onnx.py [MODEL] [FOLDER]
"""

import sys

import qcompile
from qcompile.generation.onnx_session import Session
from qcompile.generation.pretrained import load_pretrained

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
folder = sys.argv[2] if len(sys.argv) > 2 else "smollm2-onnx"

model, tokenizer = load_pretrained(name)
batches = qcompile.calibration_batches(tokenizer, count=16)
report = qcompile.export_onnx(model, folder, "int4-cpu", batches, tokenizer=tokenizer)
print(f"written: {folder}; relative error to PyTorch {report.metrics['onnx relative error']:.1e}")

session = Session(folder)
ids = tokenizer("The sea is", return_tensors="pt")["input_ids"]
print(tokenizer.decode([*ids[0], session(input_ids=ids)[0, -1].argmax()]))
