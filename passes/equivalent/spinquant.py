"""SpinQuant: rotations of the stream and of the heads, trained so that rounded activations hurt least.

Source: Liu et al. 2024, SpinQuant, arXiv:2405.16406 sec. 3 (R1 and R2 by Cayley descent on the Stiefel
        manifold; weights stay float while it learns, since GPTQ follows).
Law:    as Rotate: the output stays for every orthogonal R. What is learned is which R: the least
        KL(float || activations rounded in the rotated bases), by
        R <- (I + a/2 S)^-1 (I - a/2 S) R with S = G R^T - R G^T, which is orthogonal for any step a.
        It starts from Rotate's randomized Hadamard matrices.
        The weights are never rotated while learning: x R is rounded and rotated back, which is the
        same function and costs a product with R instead of one with every weight.
Keeps:  the output; computed in float64, cast once.
Needs:  whole batches.
Skips:  what Rotate skips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.calibration.padding import BatchTokens, CalibrationError, TokenMask
from qcompile.ir.program import Program
from qcompile.numerics.divergence import kl_divergence
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard, hadamard_factors, random_rotation, random_signs
from qcompile.numerics.straight_through import fake_quantize_ste
from qcompile.passes.equivalent.online_hadamard import GATED
from qcompile.passes.equivalent.rotate import (
    Rotate,
    conflicts,
    head_bases,
    needs_folded_norms,
    rotate_heads,
    rotate_stream,
    streams_to_rotate,
)
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class SpinQuant(Rotate):
    """Rotate with learned matrices."""

    # Format that activations are rounded to while learning; weights stay float.
    act: Format = Format("int4")
    # Steps of the descent, one batch each. The paper takes 100.
    steps: int = 100
    # Learning rate of the first step (the paper's 1.5); falls to zero along a cosine.
    lr: float = 1.5
    # Tokens of a sequence that a step reads; bounds its memory.
    tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.lr <= 0 or self.tokens < 1:
            raise RecipeError(f"SpinQuant: steps, lr and tokens must be positive, got {self}")


def cayley_step(matrix: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One step down the gradient along the orthogonal matrices, [n, n] -> [n, n] float64.

    `lr` is cut to 1 / |S|, beyond which the direction means nothing.
    """
    r, g = matrix.double(), gradient.double()
    skew = g @ r.t() - r @ g.t()
    lr = min(lr, 1.0 / float(skew.norm().clamp_min(1e-12)))
    eye = torch.eye(len(r), dtype=torch.float64, device=r.device)
    stepped: Tensor = torch.linalg.solve(eye + lr / 2 * skew, (eye - lr / 2 * skew) @ r)
    return stepped


@dataclass
class _Basis:
    """A matrix to learn, and how a value enters and leaves its basis."""

    matrix: Tensor

    def round(self, x: Tensor, form: Format) -> Tensor:
        """Round x [.., k b] in the basis, b = len(matrix), and rotate it back."""
        blocks = x.unflatten(-1, (-1, len(self.matrix)))
        matrix = self.matrix.to(x)
        rotated = (blocks @ matrix).flatten(-2)
        back: Tensor = fake_quantize_ste(rotated, form).unflatten(-1, (-1, len(matrix))) @ matrix.t()
        return back.flatten(-2)


@rewrites(SpinQuant, Stage.ROTATE, exact=True, needs=("batches",), requires=needs_folded_norms, conflicts=conflicts)
def spinquant(program: Program, config: SpinQuant, context: PassContext) -> PassReport:
    """Learn the bases of every closed stream and of every head, and rotate the program to them, in place."""
    report = PassReport("SpinQuant")
    rounders: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
    learned: list[_Basis] = []
    groups, norm_outputs = context.facts.consumers, context.facts.norm_outputs

    def learn(matrix: Tensor) -> _Basis:
        learned.append(_Basis(matrix.clone().requires_grad_()))
        return learned[-1]

    streams, heads = [], []
    for index, (label, stream) in enumerate(streams_to_rotate(program, context, report) if config.stream else []):
        basis = learn(random_rotation(stream.size, config.seed + index)[0])
        streams.append((stream, basis, label))
        names = {site.name for site in stream.consumers}
        for group in groups:
            if not group.other_consumers and any(site.name in names for site in group.sites):
                rounders[group.root] = partial(basis.round, form=config.act)
    for group, source in head_bases(program, context, report) if config.heads else []:
        basis = learn(random_rotation(source.head, config.seed + 1000)[0])
        heads.append((group, source, basis))
        rounders[group.root] = partial(basis.round, form=config.act)
    for group in groups:  # what OnlineHadamard will rotate
        k = group.sites[0].K
        free = group.root not in norm_outputs and group.root not in rounders and not group.other_consumers
        if free and group.root.target in GATED and hadamard_factors(k) is not None:
            signs = random_signs(k, config.seed)
            rounders[group.root] = partial(_in_hadamard, signs=signs, form=config.act)
    if learned:
        mask = TokenMask(program)
        first, last = _descend(mask, config, context, learned, rounders)
        report.notes.append(f"{config.steps} steps: divergence {first:.4f} -> {last:.4f} nats a token")
        report.notes += mask.notes()
    for stream, basis, label in streams:
        rotate_stream(program, stream, basis.matrix.detach(), label, report)
    for group, source, basis in heads:
        rotate_heads(program, group, source, basis.matrix.detach(), report)
    return report


def _in_hadamard(x: Tensor, signs: Tensor, form: Format) -> Tensor:
    """Round x [.., n] behind its Hadamard transform, and transform it back."""
    n = x.shape[-1]
    rotated = apply_hadamard(x, signs.to(x))
    back = torch.eye(n, dtype=x.dtype, device=x.device)
    return fake_quantize_ste(rotated, form) @ apply_hadamard(back, signs.to(x)).t()


def _descend(
    mask: TokenMask,
    config: SpinQuant,
    context: PassContext,
    learned: list[_Basis],
    rounders: dict[fx.Node, Callable[[Tensor], Tensor]],
) -> tuple[float, float]:
    """Cayley descent on all bases; returns the mean divergence of the first and of the last steps."""
    program, batches, tokens = mask.program, list[list[Any]](), list[BatchTokens]()
    for number, batch in enumerate(context.data(), 1):
        start = mask.of(batch, number).first_token()
        batches.append(_cut(batch, start, config.tokens))
        tokens.append(mask.of(batches[-1], number))
    if not batches:
        raise CalibrationError("the calibration iterator is empty: give at least one batch")

    class Rounded(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            return rounders[n](value) if n in rounders else value

    history = []
    for step in context.track(range(config.steps), "SpinQuant"):
        batch, own = batches[step % len(batches)], tokens[step % len(batches)]
        with torch.no_grad():
            expected = own.select(program.outputs[0], program(*batch)[0])
        with torch.enable_grad():
            out = Rounded(program.graph_module).run(*program.bind(batch))
            logits = own.select(program.outputs[0], out[0] if isinstance(out, (tuple, list)) else out)
            loss = kl_divergence(expected, logits)
            gradients = torch.autograd.grad(loss, [b.matrix for b in learned])
        lr = config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2
        for basis, gradient in zip(learned, gradients, strict=True):
            basis.matrix = cayley_step(basis.matrix.detach(), gradient, lr).requires_grad_()
        history.append(float(loss.detach()))
    few = max(1, min(len(batches), config.steps // 4))
    return sum(history[:few]) / few, sum(history[-few:]) / few


def _cut(batch: Sequence[Any], start: int, tokens: int) -> list[Any]:
    """So many tokens of every [B, T] integer input, from `start`."""
    end = start + tokens
    return [
        x[:, start:end] if isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point() else x for x in batch
    ]
