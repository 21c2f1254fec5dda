"""Q-GaLore in whole training loops: two processes, transformers' Trainer, checkpoints that settle and export."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from q_galore_models import FLOAT, data, loss_of, low_rank_linears, net, prepared, steps
from torch import nn

import qcompile
from qcompile.passes import QGaLore
from qcompile.training.optim import QGaLoreAdamW8bit, fold_after

CONFIGS = {"float": FLOAT, "int8": {}}


def optimizer_of(model, config):
    if config == "int8":
        return QGaLoreAdamW8bit(model.parameters(), lr=1e-2)
    return fold_after(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0))


def weights(model):
    return torch.cat([module.weight.flatten() for module in low_rank_linears(model)]).clone()


def rank_worker(rank, port, config, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = prepared(net(), **CONFIGS[config])
    optimizer = optimizer_of(model, config)  # before DDP, as accelerate has it
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=config == "float")
    for step in range(7):
        optimizer.zero_grad()
        loss_of(parallel, data(2 * step + rank)).backward()
        optimizer.step()
    found = [torch.empty_like(weights(model)) for _ in range(2)]
    dist.all_gather(found, weights(model))
    if rank == 0:
        results.put([part.tolist() for part in found])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_two_ranks_are_one_process(config):
    """The gradient of a refresh is summed over the ranks before it is decomposed; so both have one basis."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=rank_worker, args=(rank, port, config, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    first, second = (torch.tensor(part) for part in results.get(timeout=120))
    for worker in workers:
        worker.join()
    assert torch.equal(first, second)
    single = prepared(net(), **CONFIGS[config])
    start = weights(single)
    optimizer = optimizer_of(single, config)
    for step in range(7):
        optimizer.zero_grad()
        both = tuple(torch.cat(pair) for pair in zip(data(2 * step), data(2 * step + 1), strict=True))
        loss_of(single, both).backward()
        optimizer.step()
    moved = float((weights(single) - start).norm())
    # Sums in another order flip a few stochastic draws of int8 weights, by a scale each.
    assert float((weights(single) - first).norm()) < (1e-4 if config == "float" else 0.3) * moved


def test_a_trained_model_settles_saves_and_compiles(tmp_path):
    model = prepared(net())
    optimizer = QGaLoreAdamW8bit(model.parameters(), lr=1e-2)
    steps(model, optimizer, 0, 5)
    model.eval()
    x = data(9)[0]
    expected = model(x)
    qcompile.settle(model)
    assert torch.allclose(model(x), expected, atol=1e-6)
    qcompile.save(model, tmp_path / "m")
    loaded = qcompile.load(tmp_path / "m", net(seed=4))
    assert torch.equal(loaded(x), model(x))
    assert torch.allclose(torch.compile(model, backend="aot_eager")(x), expected, atol=1e-6)


@pytest.mark.slow
def test_folds_of_compiled_steps_are_those_of_eager_steps():
    """By kernels that give the bits of their definition (tests/codegen/cpu/test_training_kernels.py)."""
    eager, compiled = prepared(net(), weight="int8/row"), prepared(net(), weight="int8/row")
    steps(eager, QGaLoreAdamW8bit(eager.parameters(), lr=1e-2), 0, 4)
    forward = torch.compile(compiled, backend="qcompile")
    steps(compiled, QGaLoreAdamW8bit(compiled.parameters(), lr=1e-2), 0, 4, forward=forward)
    assert float((weights(eager) - weights(compiled)).abs().max()) < 0.01


@pytest.mark.slow
def test_a_settled_model_exports(tmp_path):
    import onnxruntime as runtime

    model = prepared(net((12, 64, 32, 8)), rank=8)
    steps(model, QGaLoreAdamW8bit(model.parameters(), lr=1e-2), 0, 3)
    qcompile.settle(model)
    x = data(9)[0]
    qcompile.export_onnx(model, tmp_path / "m", example=x, progress=False)
    session = runtime.InferenceSession(str(tmp_path / "m" / "model.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(out), model(x), atol=1e-2)


def decoder():
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False)
    )
    recipe = qcompile.Recipe("test", (QGaLore(rank=8, gap=3),))
    qcompile.train(model, recipe, progress=False)
    return model.train()


def texts():
    torch.manual_seed(3)
    return [{"input_ids": (ids := torch.randint(0, 64, (16,))), "labels": ids} for _ in range(64)]


def trainer(folder, optimizer, checkpointing=False):
    import transformers

    model = decoder()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        gradient_accumulation_steps=2, max_grad_norm=1.0, logging_strategy="no", report_to=[], use_cpu=True, seed=1,
        activation_checkpointing=checkpointing, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    optimizers, kinds = (None, None), None
    if optimizer == "ours":
        kinds = (QGaLoreAdamW8bit, {"lr": 1e-2})
    else:
        optimizers = (fold_after(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)), None)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=texts(), optimizers=optimizers, optimizer_cls_and_kwargs=kinds
    )


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "checkpointing"), [("ours", False), ("adamw", True)])
def test_trainer_resumes_bit_for_bit(tmp_path, optimizer, checkpointing):
    """With accumulation and clipping; activation checkpointing is on in one of the cases."""
    whole = trainer(tmp_path / "whole", optimizer, checkpointing)
    start = weights(whole.model)
    whole.train()
    again = trainer(tmp_path / "again", optimizer, checkpointing)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not torch.equal(weights(whole.model), start)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    import transformers

    with pytest.raises((OSError, ValueError), match="none for from_pretrained"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-3")
