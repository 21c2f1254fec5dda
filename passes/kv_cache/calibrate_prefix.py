"""CalibratePrefix: train the keys and values of IntactKV's prefix to make up for what quantization lost.

Source: Liu et al. 2024, arXiv:2403.01241 sec. 3.3 (AdamW at 2e-4, gradients clipped to 0.3, all else
        frozen). The authors match the output of every decoder layer; here the loss is
        KL(float || quantized) of the logits, which needs no notion of a layer.
Law:    nothing but the prefix changes. What is kept is the prefix of least divergence on the last
        quarter of the batches, which it was not trained on, the lossless one among the candidates:
        never worse there.
Needs:  whole batches, token ids alone; IntactKV and the quantized sites before it.
Leaves: the graph as it is, as IntactKV does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx

from qcompile.analysis.attention_scores import products
from qcompile.calibration.statistics import CalibrationError, Statistics
from qcompile.ir.program import Program
from qcompile.numerics.divergence import divergence
from qcompile.numerics.fake_quantize import fake_quantize_ste
from qcompile.numerics.format import Format
from qcompile.passes.qdq.site_plan import BEFORE, SitePlan
from qcompile.recipe.recipe import RecipeError
from qcompile.recipe.registry import rewrites
from qcompile.recipe.report import PassReport

ops = torch.ops.qcompile


@dataclass(frozen=True)
class CalibratePrefix:
    """The training."""

    steps: int = 64
    lr: float = 2e-4
    tokens: int = 512  # of a batch that a step looks at

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.tokens < 2:
            raise RecipeError(f"CalibratePrefix: steps, rate and tokens must be positive, got {self}")


class PrefixHeads:
    """Keys or values [1, H, p, D] to train; heads that repeat one another (grouped queries) stay equal."""

    def __init__(self, start: Tensor) -> None:
        heads = list(start[0])
        first = [next(i for i, other in enumerate(heads) if torch.equal(head, other)) for head in heads]
        kept = sorted(set(first))
        self.place = torch.tensor([kept.index(i) for i in first])
        self.own = start[:, kept].clone().requires_grad_()

    @property
    def all(self) -> Tensor:
        """[1, H, p, D]."""
        return self.own[:, self.place]


class Trainable(fx.Interpreter):
    """A quantized program, before it is fused, with gradients and with other keys and values first."""

    def __init__(self, program: Program, prefix: dict[fx.Node, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(program.graph_module)
        self.prefix = prefix
        self.numbers: dict[fx.Node, Any] = {}  # of quantized weights, made once

    def run_node(self, n: fx.Node) -> Any:
        """As written; activations are rounded straight through."""
        if n.target is ops.dequantize.default:
            if isinstance(n.args[0], fx.Node) and n.args[0].op == "placeholder":
                if n not in self.numbers:
                    self.numbers[n] = super().run_node(n)
                return self.numbers[n]
            value = self.env[n.args[0]].to(n.args[6])
        elif n.target is ops.quantize.default:
            x, form = n.args
            return fake_quantize_ste(self.env[x], Format.parse(str(form))), None, None
        else:
            value = super().run_node(n)
        return self.prefix[n](value) if n in self.prefix else value


@rewrites(
    CalibratePrefix,
    exact=False,
    sitewise=True,
    needs=("batches",),
    after=(*BEFORE, "Quantize", "LoRC"),
    requires=("IntactKV", "Quantize"),
)
def calibrate_prefix(program: Program, config: CalibratePrefix, statistics: Statistics, plan: SitePlan) -> PassReport:
    """Train, on texts that are made to begin with the prefix."""
    assert plan.batches is not None and plan.reference is not None
    report, start, ids = PassReport("CalibratePrefix"), plan.made, plan.made["ids"]
    texts = [torch.cat([ids.expand(len(b[0]), -1), b[0][:, : config.tokens - len(ids)]], 1) for b in plan.batches()]
    if len(texts) < 2:
        raise CalibrationError("CalibratePrefix: one batch to train on and one to judge by are needed: give more")
    held = texts[-max(1, len(texts) // 4) :]
    train = texts[: -len(held)]
    heads: dict[str, PrefixHeads] = {}
    places: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
    for index, flow in enumerate(products(program)):
        for part, node, turned in (("keys", flow.keys, flow.turned), ("values", flow.values, False)):
            heads[f"{index}.{part}"] = own = PrefixHeads(start[f"{index}.{part}"])
            places[node] = lambda x, own=own, turned=turned: _begin(x, own.all, turned)
    run = Trainable(program, places)
    leaves = [own.own for own in heads.values()]
    adam = torch.optim.AdamW(leaves, lr=config.lr, weight_decay=0.0)

    def loss(text: Tensor) -> Tensor:
        with torch.no_grad():
            want = _logits(plan.reference(text))
        got = _logits(run.run(*program.bind([text])))
        return divergence(want[:, len(ids) :], got[:, len(ids) :])

    def judge() -> float:
        with torch.no_grad():
            return sum(float(loss(text)) for text in held) / len(held)

    first = least = judge()
    best = [leaf.detach().clone() for leaf in leaves]
    rounds = max(1, config.steps // 4)
    for step in track(range(1, config.steps + 1), "CalibratePrefix", disable=not plan.progress, transient=True):
        adam.zero_grad()
        with torch.enable_grad():
            loss(train[step % len(train)]).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 0.3)
        adam.step()
        if step % rounds == 0 and (now := judge()) < least:
            least, best = now, [leaf.detach().clone() for leaf in leaves]
    for own, value in zip(heads.values(), best, strict=True):
        own.own = value
    report.tensors = {name: own.all for name, own in heads.items()}
    report.done = [f"{len(ids)} tokens"]
    report.notes.append(f"{config.steps} steps: divergence {first:.4f} -> {least:.4f} nats a token on texts held back")
    return report


def _begin(x: Tensor, first: Tensor, turned: bool) -> Tensor:
    """x [B, H, T, D] (turned: [B, H, D, T]) with its first tokens replaced by `first` [1, H, p, D].

    Heads may be folded into rows: [B H, T, D].
    """
    if x.ndim == 3:
        return _begin(x.unflatten(0, (-1, first.shape[1])), first, turned).flatten(0, 1)
    axis, first = (-1, first.transpose(-1, -2)) if turned else (-2, first)
    p = first.shape[axis]
    rest = x.narrow(axis, p, x.shape[axis] - p)
    return torch.cat([first.expand(len(x), -1, -1, -1).to(x.dtype), rest], axis)


def _logits(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found
