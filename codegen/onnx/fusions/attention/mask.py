"""Which tokens a token of a decoder sees, and what their places add to its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.onnx.fusions.attention.match_scores import Differs, ScoreFunction
from qcompile.codegen.onnx.fusions.attention.sample_inputs import Trial
from qcompile.codegen.onnx.ops.attention_ops import causal


def window_and_bias(trial: Trial, scores: ScoreFunction, positions: int) -> tuple[int, Tensor | None]:
    """The window of a causal mask, -1 for none, and what is added to the scores by the place of the key alone.

    The softmax does not see what a whole row has in common: a bias by distance, slope (key - query) as ALiBi
    (arXiv:2108.12409) has it, is one by the place of the key, and [H, positions] float32 here, 0 at the last place.

    Raises:
        Differs: a mask that is not causal, or another bias.
    """

    def biases(rows: int, new: int, past: int, padding: Tensor | None = None) -> Tensor:
        given = trial.inputs(rows, new, past)
        if padding is not None:
            given[trial.mask] = padding
        return scores.bias(given, rows, new, past + new)

    node = scores.product.node
    far = biases(1, 2, positions - 2)[0, :, -1]
    seen = int((far[0] > -torch.inf).sum())
    window = -1 if seen == positions else seen
    far = (far - far[:, -1:]).masked_fill(far == -torch.inf, 0)

    def fits(found: Tensor, past: int) -> bool:
        """Whether biases [H, S, P + S] are those of a causal mask and the table."""
        new = found.shape[1]
        mask = causal(past, new, window)
        if not bool(((found > -torch.inf) == mask).all()):
            raise Differs(node, "the mask is not causal")
        table = far[:, None, : past + new] - far[:, past : past + new, None]
        own = found - found[:, :, past:].diagonal(dim1=1, dim2=2)[:, :, None]
        return torch.allclose(own[:, mask], table[:, mask], rtol=1e-5, atol=1e-4)

    good = True
    for rows, new, past in ((2, trial.new, trial.past), (1, 2, positions - 2), (2, 6, 0)):
        good &= all(fits(row, past) for row in biases(rows, new, past))
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[1, 4:] = 0
    whole, short = biases(2, 6, 0, padding)
    if not good or not fits(whole, 0):
        raise Differs(node, "scores have a bias that is not one of the keys' places (ALiBi)")
    try:
        kept = fits(short[:, :4, :4], 0) and not bool((short[:, :4, 4:] > -torch.inf).any())
    except Differs:
        kept = False
    if not kept:
        raise Differs(node, "padding behind a text changes what it sees")
    return window, far.float() if bool(far.any()) else None
