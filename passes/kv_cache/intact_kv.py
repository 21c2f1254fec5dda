"""IntactKV: the keys and values of the first tokens as the float model computes them.

Source: Liu et al. 2024, arXiv:2403.01241 sec. 3 (variant [B]: the beginning-of-sequence token; [P]: a
        whole prompt).
Law:    the first tokens of a text carry the largest activations and draw most of the attention; what
        a quantized model computes for them is wrong for every later token. Their keys, values and
        logits are taken from the float model and kept float: lossless for them by construction.
Needs:  nothing.   Leaves: the graph as it is; the prefix goes with the module's calls
        (qcompile/modules/generation_hooks.py): a text that begins with it starts from these keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.attention_scores import products
from qcompile.calibration.statistics import Statistics
from qcompile.ir.program import Program
from qcompile.passes.qdq.site_plan import EXACT
from qcompile.recipe.recipe import RecipeError
from qcompile.recipe.registry import rewrites
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class IntactKV:
    """The ids of the prefix; empty: the model's own beginning-of-sequence token."""

    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(not isinstance(token, int) or token < 0 for token in self.prefix):
            raise RecipeError(f"IntactKV: the prefix is a tuple of token ids, got {self.prefix}")


@rewrites(IntactKV, exact=False, after=EXACT)
def intact_kv(program: Program, config: IntactKV, statistics: Statistics) -> PassReport:
    """Compute keys [1, H, p, D], values and logits [1, p, V] of the prefix with the float program."""
    report = PassReport("IntactKV")
    inputs = program.inputs
    if not config.prefix:
        raise RecipeError("IntactKV: give the token ids of the prefix; this model names no beginning-of-sequence token")
    if len(inputs) != 1 or inputs[0].meta["val"].dtype != torch.int64:
        raise RecipeError(f"IntactKV: the model must take token ids alone, it takes {[n.name for n in inputs]}")
    flows = products(program)
    found: dict[fx.Node, Tensor] = {}
    ids = torch.tensor([config.prefix, config.prefix])  # two rows, as the program was traced
    logits = program.outputs[0]
    program.watch({logits, *(f.keys for f in flows), *(f.values for f in flows)}, [ids], found.__setitem__)
    for index, flow in enumerate(flows):
        keys = found[flow.keys].transpose(-1, -2) if flow.turned else found[flow.keys]
        report.tensors[f"{index}.keys"] = _first_row(keys)
        report.tensors[f"{index}.values"] = _first_row(found[flow.values])
    report.tensors["logits"] = found[logits][:1].clone()
    report.tensors["ids"] = ids[0]
    report.notes.append(f"{len(config.prefix)} tokens of {len(flows)} attentions from the float model")
    return report


def _first_row(x: Tensor) -> Tensor:
    """[2, H, p, D], or [2 H, p, D] where attention folds heads into rows -> [1, H, p, D]."""
    return (x if x.ndim == 4 else x.unflatten(0, (2, -1)))[:1].clone()
