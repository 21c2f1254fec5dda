"""Fine-tune adapters on a 4-bit model and merge them without a second rounding (QA-LoRA).

python examples/finetune_adapters.py [MODEL] [STEPS]
"""

import sys

import torch

import qcompile
from qcompile.generation.pretrained import load_pretrained

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

model, tokenizer = load_pretrained(name)
qcompile.quantize(model, "w4a16-g32")
qcompile.qa_lora(model, rank=8, alpha=16)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
for step, batch in enumerate(qcompile.calibration_batches(tokenizer, count=steps, length=64)):
    optimizer.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.3f}")

qcompile.settle(model)  # the adapters are in the zero points: an ordinary quantized model
qcompile.save(model, "finetuned", tokenizer)
print("written: finetuned")
