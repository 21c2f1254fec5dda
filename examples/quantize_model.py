"""Quantize a language model with calibration text, measure what it costs, save and load it.

python examples/quantize_model.py [MODEL] [FOLDER]
"""

import copy
import sys

import qcompile
from qcompile.calibration.text import embedded_text, windows
from qcompile.evaluation.perplexity import agreement, perplexity
from qcompile.generation.pretrained import load_pretrained

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
folder = sys.argv[2] if len(sys.argv) > 2 else "smollm2-w4a16"

model, tokenizer = load_pretrained(name)
reference = copy.deepcopy(model)

report = qcompile.quantize(model, "w4a16-gptq", qcompile.calibration_batches(tokenizer, count=16))
print(report)  # every site: its format, or the reason why it stays float

held_out = windows(tokenizer, embedded_text()[200_000:], length=256, count=4)
found = agreement(model, reference, held_out)
before = perplexity(reference, held_out)
print(f"perplexity {before:.2f} -> {found.perplexity:.2f}, KL {found.kl:.4f}, same top-1 {found.top1:.1%}")

qcompile.save(model, folder, tokenizer)
again = qcompile.load_pretrained(folder)[0]
ids = held_out[0][:, :16]
assert again(input_ids=ids).logits.equal(model(input_ids=ids).logits)
print(f"written: {folder}; it loads with the same logits")
