"""Masks that only some batches have."""

from __future__ import annotations

import torch

from qcompile.api.missing_masks import with_all_masks
from qcompile.ir.call_tree import CallTree

IDS, MASK = torch.randint(3, 9, (2, 5)), torch.tensor([[1, 1, 1, 0]])


def test_a_mask_that_a_batch_lacks_is_of_ones():
    whole, own = with_all_masks(
        [CallTree((), {"input_ids": IDS}), CallTree((), {"input_ids": IDS[:1, :4], "attention_mask": MASK})]
    )
    assert list(whole.kwargs) == ["input_ids", "attention_mask"]
    assert torch.equal(whole.kwargs["attention_mask"], torch.ones_like(IDS))
    assert own.kwargs["attention_mask"] is MASK


def test_tokens_by_position_and_of_a_decoder():
    first, _ = with_all_masks(
        [
            CallTree((IDS,), {"decoder_inputs_embeds": torch.randn(2, 3, 4)}, ("input_ids",)),
            CallTree((IDS,), {"attention_mask": MASK.bool(), "decoder_attention_mask": MASK}, ("input_ids",)),
        ]
    )
    assert first.kwargs["attention_mask"].shape == (2, 5) and first.kwargs["attention_mask"].dtype == torch.bool
    assert first.kwargs["decoder_attention_mask"].tolist() == [[1, 1, 1]] * 2


def test_nothing_is_added_where_no_batch_has_a_mask_or_tokens_are_not_known():
    calls = [CallTree((), {"input_ids": IDS}), CallTree((), {"input_ids": IDS})]
    assert [call.kwargs for call in with_all_masks(calls)] == [call.kwargs for call in calls]
    (first, _) = with_all_masks([CallTree((), {"x": IDS}), CallTree((), {"x": IDS, "attention_mask": MASK})])
    assert list(first.kwargs) == ["x"]
