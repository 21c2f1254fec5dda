"""IntactKV: the keys and values of the first tokens as the float model computes them.

Source: Liu et al. 2024, arXiv:2403.01241 sec. 3 (variant [B]: the beginning-of-sequence token; [P]: a
        whole prompt).
Law:    the first tokens of a text carry the largest activations and draw most of the attention; what
        a quantized model computes for them is wrong for every later token. Their keys, values and
        logits are taken from the float model and kept float: lossless for them by construction.
Keeps:  the graph; the prefix goes with the module's calls (qcompile/modules/generation_hooks.py): a text that begins
        with it starts from these keys and values.
Needs:  nothing.
Skips:  nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import KVConstants, PassReport, PrefixValues
from qcompile.recipe.rule import RecipeError


@dataclass(frozen=True)
class IntactKV(PassConfig):
    """The tokens whose keys and values stay float."""

    # Token ids of the prefix. Empty: the model's own beginning-of-sequence token, the paper's variant [B].
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(not isinstance(token, int) or token < 0 for token in self.prefix):
            raise RecipeError(f"IntactKV: prefix must hold token ids, got {self.prefix}")


@rewrites(IntactKV, Stage.KV_PREFIX, exact=False)
def intact_kv(program: Program, config: IntactKV, context: PassContext) -> PassReport:
    """Compute keys [1, H, p, D], values and logits [1, p, V] of the prefix with the float program."""
    report = PassReport("IntactKV")
    inputs = program.inputs
    if not config.prefix:
        raise RecipeError("IntactKV: this model names no beginning-of-sequence token. Fix: IntactKV(prefix=(id, ..))")
    if len(inputs) != 1 or inputs[0].meta["val"].dtype != torch.int64:
        raise RecipeError(f"IntactKV: the model must take token ids alone, it takes {[n.name for n in inputs]}")
    attentions = context.facts.attentions
    found: dict[fx.Node, Tensor] = {}
    ids = torch.tensor([config.prefix, config.prefix])  # two rows, as the program was traced
    logits = program.outputs[0]
    program.watch({logits, *(a.keys for a in attentions), *(a.values for a in attentions)}, [ids], found.__setitem__)
    keys = [found[a.keys].transpose(-1, -2) if a.keys_transposed else found[a.keys] for a in attentions]
    prefix = PrefixValues(
        ids=ids[0],
        keys=tuple(map(_first_row, keys)),
        values=tuple(_first_row(found[a.values]) for a in attentions),
        logits=found[logits][:1].clone(),
    )
    report.constants = KVConstants(prefix=prefix)
    report.notes.append(f"{len(config.prefix)} tokens of {len(attentions)} attentions from the float model")
    return report


def _first_row(x: Tensor) -> Tensor:
    """[2, H, p, D], or [2 H, p, D] where attention folds heads into rows -> [1, H, p, D]."""
    return (x if x.ndim == 4 else x.unflatten(0, (2, -1)))[:1].clone()
