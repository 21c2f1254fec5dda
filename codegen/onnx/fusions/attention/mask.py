"""Which tokens a token of a decoder attends to, and what the positions of keys add to its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.onnx.fusions.attention.match_scores import ScoreFunction
from qcompile.codegen.onnx.fusions.attention.mismatch import Mismatch
from qcompile.codegen.onnx.fusions.attention.sample_inputs import SampleInputs
from qcompile.codegen.onnx.ops.attention_ops import causal_mask


def find_window_and_bias(samples: SampleInputs, scores: ScoreFunction, positions: int) -> tuple[int, Tensor | None]:
    """The window of a causal mask, and what is added to the scores by the position of the key alone.

    The softmax does not change with what a whole row has in common: a bias by distance, slope (key - query) as ALiBi
    (arXiv:2108.12409) has it, is one by the position of the key, 0 at the last position.

    Returns:
        How many tokens a token attends to, -1 for all; and [H, positions] float32, or None for no bias.

    Raises:
        Mismatch: a mask that is not causal, or another bias.
    """
    node = scores.product.node

    def biases(batch: int, new: int, past: int, padding_mask: Tensor | None = None) -> Tensor:
        given = samples.values(batch, new, past)
        if padding_mask is not None:
            given[samples.mask] = padding_mask
        return scores.bias(given, batch, new, past + new)

    last_row = biases(1, 2, positions - 2)[0, :, -1]
    visible = int((last_row[0] > -torch.inf).sum())
    window = -1 if visible == positions else visible
    by_position = (last_row - last_row[:, -1:]).masked_fill(last_row == -torch.inf, 0)

    def fits(bias: Tensor, past: int) -> bool:
        """Whether a bias [H, S, P + S] is that of a causal mask and the table."""
        new = bias.shape[1]
        mask = causal_mask(past, new, window)
        if not bool(((bias > -torch.inf) == mask).all()):
            raise Mismatch(node, "the mask is not causal")
        want = by_position[:, None, : past + new] - by_position[:, past : past + new, None]
        got = bias - bias[:, :, past:].diagonal(dim1=1, dim2=2)[:, :, None]
        return torch.allclose(got[:, mask], want[:, mask], rtol=1e-5, atol=1e-4)

    fits_all = True
    for batch, new, past in ((2, samples.new, samples.past), (1, 2, positions - 2), (2, 6, 0)):
        fits_all &= all(fits(row, past) for row in biases(batch, new, past))
    padding_mask = torch.ones(2, 6, dtype=torch.long)
    padding_mask[1, 4:] = 0
    whole, short = biases(2, 6, 0, padding_mask)
    if not fits_all or not fits(whole, 0):
        raise Mismatch(node, "scores have a bias that is not one of the keys' positions (ALiBi)")
    try:
        same = fits(short[:, :4, :4], 0) and not bool((short[:, :4, 4:] > -torch.inf).any())
    except Mismatch:
        same = False
    if not same:
        raise Mismatch(node, "padding behind a text changes what it attends to")
    return window, by_position.float() if bool(by_position.any()) else None
