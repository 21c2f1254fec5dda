"""What benches/q_galore.py compares: the small model, its data, and one (model, optimizer) for each way to train it.

Peers are optional: galore-torch, bitsandbytes, and a checkout of github.com/VITA-Group/Q-GaLore, whose package on PyPI
lacks a module, and which is adapted here at run time to bitsandbytes 0.50 and to machines without CUDA.
"""

from __future__ import annotations

import math
import pydoc_data.topics
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RANK, GAP, SCALE = 32, 40, 0.25
BATCH, LENGTH = 8, 128
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")

_TEXT = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8).long()
_HELD_OUT = len(_TEXT) * 9 // 10


@dataclass
class Variant:
    """A model that is trained.

    Attributes:
        model: in training mode.
        optimizer: of its parameters.
        sizes: gives the bytes of weights, projections, moments, gradients and low-rank parameters, behind a step.
        decompositions: gives how many there have been.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sizes: Callable[[], dict[str, int]]
    decompositions: Callable[[], int]


def decoder(hidden: int = 128, layers: int = 4, seed: int = 0) -> nn.Module:
    """A decoder of bytes with random weights, the same ones for each call with a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = hidden // 32
    sizes = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=256)
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, use_cache=False)
    return LlamaForCausalLM(config).train()


def batch(step: int, rows: int = BATCH, *, held_out: bool = False) -> Tensor:
    """Random windows of the text, [rows, 128] int64."""
    low, high = (_HELD_OUT, len(_TEXT)) if held_out else (0, _HELD_OUT)
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(low, high - LENGTH, (rows,), generator=generator)
    return torch.stack([_TEXT[start : start + LENGTH] for start in starts])


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate: 10 % warm-up, then a cosine to 10 %."""
    return peak * min(1, (step + 1) / (0.1 * steps)) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def build(kind: str, lr: float, hidden: int = 128, reference: str | None = None, seed: int = 0) -> Variant:
    """One of KINDS. Raises ImportError where a peer is not there."""
    model = decoder(hidden, seed=seed)
    rank = max(RANK, hidden // 4)
    if kind == "reference":
        return _reference(model, lr, rank, reference)
    if kind.startswith("galore_torch"):
        return _galore_torch(model, lr, rank)
    if kind.startswith("adamw"):
        return _plain(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))
    if kind == "bitsandbytes":
        import bitsandbytes

        return _plain(model, bitsandbytes.optim.AdamW8bit(model.parameters(), lr=lr, weight_decay=0.0))
    return _ours(model, kind, lr, rank)


def one_step(variant: Variant, step: int, forward: Any = None, rows: int = BATCH) -> None:
    """One step on one batch of `rows` windows; gradients stay until the next."""
    ids = batch(step, rows)
    variant.optimizer.zero_grad()
    (variant.model if forward is None else forward)(input_ids=ids, labels=ids).loss.backward()
    variant.optimizer.step()
    for parameter in variant.model.parameters():
        if hasattr(parameter, "float_grad"):  # which the reference does not clear by itself
            parameter.float_grad = None


KINDS = {
    "adamw": 0.003,
    "adamw-high": 0.01,
    "bitsandbytes": 0.003,
    "galore_torch": 0.01,
    "ours-galore": 0.01,
    "reference": 0.01,
    "ours": 0.01,
    "ours-nearest": 0.01,
    "ours-bitsandbytes": 0.01,
}
"""What is compared, with the learning rate of each."""


def _ours(model: nn.Module, kind: str, lr: float, rank: int) -> Variant:
    import qcompile
    from qcompile.ir.projected_gradient_op import REFRESHES
    from qcompile.modules.low_rank_linear import LowRankLinear
    from qcompile.passes import QGaLore
    from qcompile.training.optim import QGaLoreAdamW8bit, fold_after

    changes: dict[str, Any] = {"ours-nearest": {"rounding": "nearest"}}.get(kind, {})
    if kind == "ours-galore":
        changes = {"weight": None, "basis": None, "factor": 1}
    recipe = qcompile.Recipe(kind, (QGaLore(rank=rank, gap=GAP, scale=SCALE, **changes),))
    qcompile.train(model, recipe, progress=False)
    optimizer: torch.optim.Optimizer
    if kind == "ours-galore":
        optimizer = fold_after(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))
    elif kind == "ours-bitsandbytes":
        import bitsandbytes

        optimizer = fold_after(bitsandbytes.optim.AdamW8bit(model.parameters(), lr=lr, weight_decay=0.0))
    else:
        optimizer = QGaLoreAdamW8bit(model.parameters(), lr=lr)
    modules = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    low = {id(module.low) for module in modules}

    def sizes() -> dict[str, int]:
        def of(names: tuple[str, ...]) -> int:
            return sum(t.nbytes for m in modules for name in names if (t := getattr(m, name)) is not None)

        return {
            "weights": of(("codes", "scale", "zero")) + sum(p.nbytes for p in model.parameters() if id(p) not in low),
            "projections": of(("basis", "basis_scale", "basis_zero", "first")),
            **_optimizer_bytes(model, optimizer),
            "low": sum(module.low.untyped_storage().nbytes() for module in modules),
        }

    return Variant(model, optimizer, sizes, lambda: sum(int(m.schedule[REFRESHES]) for m in modules))


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Variant:
    def sizes() -> dict[str, int]:
        weights = sum(p.nbytes for p in model.parameters())
        return {"weights": weights, "projections": 0, **_optimizer_bytes(model, optimizer), "low": 0}

    return Variant(model, optimizer, sizes, lambda: 0)


def _projected(model: nn.Module, projections: list[Any], optimizer: torch.optim.Optimizer) -> Variant:
    """Of a peer whose optimizer has a projector in the state of each weight."""
    plain = _plain(model, optimizer)

    def projectors() -> list[Any]:
        return [state["projector"] for state in optimizer.state.values() if "projector" in state]

    def sizes() -> dict[str, int]:
        found = plain.sizes()
        tensors = [t for p in projectors() for t in vars(p).values() if isinstance(t, Tensor)]
        found["projections"] = sum(t.nbytes for t in tensors)
        found["weights"] += sum(w.scales.nbytes + w.zeros.nbytes for w in projections if hasattr(w, "scales"))
        found["gradients"] += sum(4 * w.numel() for w in projections if hasattr(w, "scales"))  # float_grad
        return found

    return Variant(model, optimizer, sizes, lambda: sum(getattr(p, "svd_count", 0) for p in projectors()))


def _groups(
    model: nn.Module, kinds: tuple[str, ...], rank: int, options: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """The weights of projections, and parameter groups in which they have `options`."""
    chosen = [m.weight for m in model.modules() if type(m).__name__ in kinds]
    chosen = [w for w in chosen if w is not model.lm_head.weight]
    ids = {id(weight) for weight in chosen}
    rest = [p for p in model.parameters() if id(p) not in ids]
    low = {"params": chosen, "rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std", **options}
    return chosen, [{"params": rest}, low]


def _galore_torch(model: nn.Module, lr: float, rank: int) -> Variant:
    from galore_torch import GaLoreAdamW

    chosen, groups = _groups(model, ("Linear",), rank, {})
    optimizer = GaLoreAdamW(groups, lr=lr, eps=1e-8, weight_decay=0.0, no_deprecation_warning=True)
    return _projected(model, chosen, optimizer)


def _reference(model: nn.Module, lr: float, rank: int, folder: str | None) -> Variant:
    if folder is None:
        raise ImportError("no checkout of VITA-Group/Q-GaLore was given")
    for name in [name for name in sys.modules if name.startswith("q_galore_torch")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    import bitsandbytes.functional as functional
    from q_galore_torch import QGaLoreAdamW8bit, q_galore_adamw8bit
    from q_galore_torch.utils.quantization import prepare_model_for_int8_training

    torch.cuda.synchronize = lambda *_: None  # which it calls without asking for CUDA

    def blockwise(name, g, p, s1, s2, b1, b2, e, step, rate, q1, q2, a1, a2, decay=0.0, gnorm_scale=1.0, skip_zeros=False):  # fmt: skip  # noqa: E501
        functional.optimizer_update_8bit_blockwise(
            name, g, p, s1, s2, b1, b2, 0.0, 0.0, e, step, rate, q1, q2, a1, a2, decay, 1.0, skip_zeros
        )

    def full(name, g, p, s1, b1, e, step, rate, s2, b2, decay, gnorm_scale, unorm=None, max_unorm=0.0, skip_zeros=False):  # fmt: skip  # noqa: E501
        functional.optimizer_update_32bit(
            name, g, p, s1, b1, e, step, rate, s2, b2, weight_decay=decay, gnorm_scale=gnorm_scale
        )

    q_galore_adamw8bit.F = types.SimpleNamespace(optimizer_update_8bit_blockwise=blockwise, optimizer_update_32bit=full)

    class Adapted(QGaLoreAdamW8bit):
        def get_config(self, *places: Any) -> dict[str, Any]:
            return dict(super().get_config(*places), percentile_clipping=100, block_wise=True)

    arguments = types.SimpleNamespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
    model = prepare_model_for_int8_training(model, arguments, list(PROJECTIONS))
    options = dict(quant=True, quant_n_bit=4, quant_group_size=256, cos_threshold=0.4, gamma_proj=2, queue_size=5)
    chosen, groups = _groups(model, ("QGaLoreLinear",), rank, options)
    return _projected(model, chosen, Adapted(groups, lr=lr, weight_decay=0.0))


def _optimizer_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    moments = [t for s in optimizer.state.values() for k, t in s.items() if isinstance(t, Tensor) and "qmap" not in k]
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return {"moments": sum(t.nbytes for t in moments), "gradients": gradients}
