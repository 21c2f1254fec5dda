from __future__ import annotations

import math

import pytest
import torch

from qcompile.calibration.text import batches, embedded_text, windows
from qcompile.evaluation.perplexity import agreement, perplexity


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % 50 for c in text]}


def uniform(*, input_ids):
    return torch.zeros(*input_ids.shape, 50)


def test_uniform_guess_has_the_vocabulary_as_perplexity():
    pieces = windows(Letters(), embedded_text(), length=64, count=3)
    assert [p.shape for p in pieces] == [(1, 64)] * 3
    assert math.isclose(perplexity(uniform, pieces, progress=False), 50, rel_tol=1e-5)
    same = agreement(uniform, uniform, pieces)
    assert (same.kl, same.top1) == (0.0, 1.0)


def test_windows_do_not_overlap_and_short_text_is_refused():
    first, second = windows(Letters(), "abcdefgh", length=4, count=2)
    assert second[0].tolist() == [ord(c) % 50 for c in "efgh"] and first[0, 0] == ord("a") % 50
    with pytest.raises(ValueError, match="gives 2 windows.*3 are needed"):
        windows(Letters(), "abcdefgh", length=4, count=3)


def test_calibration_reads_the_end(tmp_path):
    (tmp_path / "t.txt").write_text("a" * 90 + "b" * 20)
    found = batches(Letters(), tmp_path / "t.txt", length=10, count=2)
    assert len(found) == 2 and all(set(b["input_ids"].flatten().tolist()) == {ord("b") % 50} for b in found)
    with pytest.raises(ValueError, match="110 tokens"):
        batches(Letters(), tmp_path / "t.txt", length=500)
