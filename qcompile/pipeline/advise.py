"""Which recipe for which machine, by rule and with its reasons: `recipe="auto"`, `qcompile advise`.

Source: "Give Me BF16 or Give Me Death", arXiv:2411.02355 sec. 5 (deployment guidelines): one request
        at a time is bound by reading weights, so the smallest ones win; many requests at once are
        bound by arithmetic, so 8-bit activations win where the chip computes in them. For CPUs the
        rule is this project's own measurement (docs/results/torch-compile-cpu.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from qcompile.numerics.int8_matmul import has_fast_int8_matmul

Serving = Literal["sync", "async"]

_FEW = 1_000_000_000  # parameters below which four bits cost more quality than they are worth
_LARGE_MEMORY = 64e9  # bytes of a data-center chip


@dataclass(frozen=True)
class Device:
    """A machine to run on.

    Attributes:
        kind: "cpu" or "cuda".
        memory: bytes.
        capability: CUDA compute capability.
        name: for messages.
        int8: of a CPU: whether it has 8-bit dot products.
    """

    kind: Literal["cpu", "cuda"]
    memory: float
    capability: tuple[int, int] = (0, 0)
    name: str = ""
    int8: bool = True

    @staticmethod
    def here() -> Device:
        """The GPU of this machine, or its CPU."""
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            return Device("cuda", float(found.total_memory), (found.major, found.minor), found.name)
        return Device.named("cpu")

    @staticmethod
    def named(name: str) -> Device:
        """A device by name: "here", "cpu" or a GPU of `KNOWN`. Raises ValueError with the known names."""
        if name == "here":
            return Device.here()
        if name == "cpu":
            return Device("cpu", _ram(), name="this CPU", int8=has_fast_int8_matmul())
        if name.lower() not in KNOWN:
            raise ValueError(f"device {name!r} is unknown; known: here, cpu, {', '.join(KNOWN)}")
        memory, capability = KNOWN[name.lower()]
        return Device("cuda", memory * 1e9, capability, name)


# Gigabytes and compute capability, from the vendor's data sheets.
KNOWN: dict[str, tuple[int, tuple[int, int]]] = {
    "t4": (16, (7, 5)), "a10": (24, (8, 6)), "a6000": (48, (8, 6)), "a100": (80, (8, 0)), "l4": (24, (8, 9)),
    "l40s": (48, (8, 9)), "rtx4090": (24, (8, 9)), "h100": (80, (9, 0)), "h200": (141, (9, 0)), "b200": (180, (10, 0)),
}  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """A preset and the reasons for it.

    Attributes:
        recipe: the name of the preset.
        reasons: one sentence each.
    """

    recipe: str
    reasons: tuple[str, ...]


def _ram() -> float:
    if not hasattr(os, "sysconf"):  # Unix only
        raise ValueError("the memory of this machine cannot be measured on this system. Fix: name a GPU")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def parameters(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def check_serving(serving: str) -> None:
    """Refuse an unknown kind of serving. Raises ValueError."""
    if serving not in ("sync", "async"):
        raise ValueError(f"serving is 'sync' or 'async', got {serving!r}")


def advise(count: int, device: Device, serving: Serving = "sync", *, data: bool = True) -> Advice:
    """Choose a preset.

    Args:
        count: parameters of the model.
        device: where it will run.
        serving: "sync", one request at a time, or "async", continuous batches.
        data: whether calibration data is available; without, a data-free preset is chosen.

    Raises:
        ValueError: an unknown kind of serving, or a model that fits the device in no format.
    """
    check_serving(serving)
    reasons: list[str] = []
    needs4, needs8 = 0.55 * count, 1.1 * count  # with scales, and a tenth for what stays float
    if needs4 > 0.9 * device.memory:
        raise ValueError(
            f"{count / 1e9:.1f} B parameters need {needs4 / 1e9:.0f} GB in four bits, the device has "
            f"{device.memory / 1e9:.0f} GB. Fix: take a larger device, or several"
        )
    tight = needs8 > 0.8 * device.memory
    four = "w4a16-gptq" if data else "w4a16-g32"
    eight = "int8-gptq" if data else "int8"
    if tight:
        reasons.append(f"in eight bits ({needs8 / 1e9:.0f} GB) the weights would fill the device: four bits")
    elif count < _FEW:
        reasons.append("small models lose much in four bits (SmolLM2-135M: +20% perplexity with GPTQ): eight bits")
        if device.kind == "cuda" and device.capability >= (8, 9):
            return Advice("fp8", (*reasons, "the chip multiplies FP8, which needs no data and loses least"))
        return Advice("int8", (*reasons, "dynamic per token, data-free, +3.6% perplexity there"))
    if device.kind == "cpu":
        if tight:
            return Advice("w4a8-gptq" if data else "w4a8", (*reasons, "int8 dot products on int4 weights"))
        if device.int8:
            reasons.append("int8 dot products are the fastest for prompts and nearly as fast as four bits in decoding")
        else:
            reasons.append(
                "no 8-bit dot products here: int8 decodes faster than float32 and reads prompts about as fast"
            )
        return Advice(eight, tuple(reasons))
    if serving == "sync" or tight:
        reasons.append("one request at a time reads all weights for each token: the fewest bytes win (W4A16)")
        return Advice(four, tuple(reasons))
    if device.memory < _LARGE_MEMORY:
        reasons.append("continuous batches on a mid-tier GPU: W4A16 keeps the most memory free for requests")
        return Advice(four, tuple(reasons))
    reasons.append("continuous batches on a large GPU are bound by arithmetic: 8-bit activations (W8A8)")
    if device.capability >= (8, 9):
        return Advice("fp8", (*reasons, "the chip multiplies FP8, which loses least and needs no data"))
    return Advice(eight, (*reasons, "no FP8 units before compute capability 8.9: INT8"))
