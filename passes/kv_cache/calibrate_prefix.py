"""CalibratePrefix: train the keys and values of IntactKV's prefix to make up for what quantization lost.

Source: Liu et al. 2024, arXiv:2403.01241 sec. 3.3 (AdamW at 2e-4, gradients clipped to 0.3, all else
        frozen). The authors match the output of every decoder layer; here the loss is
        KL(float || quantized) of the logits, which needs no notion of a layer.
Law:    nothing but the prefix changes. The prefix of least divergence on the last quarter of the
        batches, which it was not trained on, is taken; the lossless one is a candidate: never worse there.
Keeps:  the graph, as IntactKV does.
Needs:  whole batches, token ids alone; IntactKV and the quantized sites before it.
Skips:  nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.calibration.statistics import CalibrationError
from qcompile.ir.op_calls import DequantizeCall, QuantizeCall
from qcompile.ir.program import Program
from qcompile.numerics.divergence import kl_divergence
from qcompile.numerics.format import Format
from qcompile.numerics.straight_through import fake_quantize_ste
from qcompile.passes.kv_cache.intact_kv import IntactKV
from qcompile.passes.qdq.site_plan import Quantize
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import KVConstants, PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class CalibratePrefix(PassConfig):
    """The training."""

    # Steps of AdamW, one batch each.
    steps: int = 64
    # Learning rate, constant. The paper's 2e-4.
    lr: float = 2e-4
    # Tokens of a sequence that a step reads, prefix included; bounds its memory.
    tokens: int = 512

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.tokens < 2:
            raise RecipeError(f"CalibratePrefix: steps and lr must be positive and tokens at least 2, got {self}")


class PrefixHeads:
    """Keys or values [1, H, p, D] to train; heads that repeat one another (grouped queries) stay equal.

    Attributes:
        own: what is trained, [1, heads that differ, p, D].
        place: [H] which of them each head is.
    """

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
    """A quantized program, before it is fused, with gradients and with other keys and values first.

    Attributes:
        prefix: node of keys or of values -> what replaces its first tokens.
        dequantized: the value of each quantized weight, computed once.
    """

    def __init__(self, program: Program, prefix: dict[fx.Node, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(program.graph_module)
        self.prefix = prefix
        self.dequantized: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; gradients pass the rounding of activations straight through."""
        if DequantizeCall.matches(n):
            call = DequantizeCall.of(n)
            if not call.of_activation:
                if n not in self.dequantized:
                    self.dequantized[n] = super().run_node(n)
                return self.dequantized[n]
            value = self.env[call.codes].to(call.dtype)
        elif QuantizeCall.matches(n):
            quantize = QuantizeCall.of(n)
            return fake_quantize_ste(self.env[quantize.x], Format.parse(quantize.format)), None, None
        else:
            value = super().run_node(n)
        return self.prefix[n](value) if n in self.prefix else value


@rewrites(
    CalibratePrefix,
    Stage.TRAIN,
    exact=False,
    needs=("batches",),
    requires=(IntactKV, Quantize),
)
def calibrate_prefix(program: Program, config: CalibratePrefix, context: PassContext) -> PassReport:
    """Train on texts that the prefix is put before."""
    start, reference = context.constants.prefix, context.reference
    assert start is not None and reference is not None
    report, ids = PassReport("CalibratePrefix"), start.ids
    texts = [torch.cat([ids.expand(len(b[0]), -1), b[0][:, : config.tokens - len(ids)]], 1) for b in context.data()]
    if len(texts) < 2:
        raise CalibrationError(
            "CalibratePrefix: needs a batch to train on and another to judge by. Fix: at least 2 batches"
        )
    validation = texts[-max(1, len(texts) // 4) :]
    train = texts[: -len(validation)]
    keys, values = [PrefixHeads(k) for k in start.keys], [PrefixHeads(v) for v in start.values]
    places: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
    for attention, of_keys, of_values in zip(context.facts.attentions, keys, values, strict=True):
        places[attention.keys] = partial(_begin_with, heads=of_keys, transposed=attention.keys_transposed)
        places[attention.values] = partial(_begin_with, heads=of_values, transposed=False)
    run = Trainable(program, places)
    heads = [part for pair in zip(keys, values, strict=True) for part in pair]
    leaves = [part.own for part in heads]
    adam = torch.optim.AdamW(leaves, lr=config.lr, weight_decay=0.0)

    def loss(text: Tensor) -> Tensor:
        with torch.no_grad():
            expected = _logits(reference(text))
        got = _logits(run.run(*program.bind([text])))
        return kl_divergence(expected[:, len(ids) :], got[:, len(ids) :])

    def judge() -> float:
        with torch.no_grad():
            return sum(float(loss(text)) for text in validation) / len(validation)

    first = least = judge()
    best = [leaf.detach().clone() for leaf in leaves]
    rounds = max(1, config.steps // 4)
    for step in context.track(range(1, config.steps + 1), "CalibratePrefix"):
        adam.zero_grad()
        with torch.enable_grad():
            loss(train[step % len(train)]).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 0.3)
        adam.step()
        if step % rounds == 0 and (now := judge()) < least:
            least, best = now, [leaf.detach().clone() for leaf in leaves]
    for part, value in zip(heads, best, strict=True):
        part.own = value
    trained = replace(start, keys=tuple(k.all for k in keys), values=tuple(v.all for v in values))
    report.constants = KVConstants(prefix=trained)
    report.done = [f"{len(ids)} tokens"]
    report.notes.append(f"{config.steps} steps: divergence {first:.4f} -> {least:.4f} nats a token on validation texts")
    return report


def _begin_with(x: Tensor, heads: PrefixHeads, transposed: bool) -> Tensor:
    return _begin(x, heads.all, transposed)


def _begin(x: Tensor, first: Tensor, transposed: bool) -> Tensor:
    """x [B, H, T, D] (transposed: [B, H, D, T]) with its first tokens replaced by `first` [1, H, p, D].

    Heads may be folded into rows: [B H, T, D].
    """
    if x.ndim == 3:
        return _begin(x.unflatten(0, (-1, first.shape[1])), first, transposed).flatten(0, 1)
    axis, first = (-1, first.transpose(-1, -2)) if transposed else (-2, first)
    p = first.shape[axis]
    rest = x.narrow(axis, p, x.shape[axis] - p)
    return torch.cat([first.expand(len(x), -1, -1, -1).to(x.dtype), rest], axis)


def _logits(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found
