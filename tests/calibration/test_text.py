from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from qcompile.calibration.text import batches, embedded_text, read_text, sentence_batches, sentences, windows
from qcompile.evaluation.perplexity import agreement, perplexity


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text, *, add_special_tokens, **_):
        assert not add_special_tokens
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
    (skipped,) = windows(Letters(), "abcdefgh", length=4, count=1, skip=1)
    assert torch.equal(skipped, second)
    with pytest.raises(ValueError, match="gives 2 windows.*3 are needed"):
        windows(Letters(), "abcdefgh", length=4, count=1, skip=2)


def test_calibration_reads_the_end(tmp_path):
    (tmp_path / "t.txt").write_text("a" * 90 + "b" * 20)
    found = batches(Letters(), tmp_path / "t.txt", length=10, count=2)
    assert len(found) == 2 and all(set(b["input_ids"].flatten().tolist()) == {ord("b") % 50} for b in found)
    assert len(batches(Letters(), tmp_path / "t.txt", length=10)) == 11, "as many as there are"
    with pytest.raises(ValueError, match="110 tokens"):
        batches(Letters(), tmp_path / "t.txt", length=500)


@pytest.mark.parametrize("bad", [dict(length=0), dict(length=-5), dict(count=0), dict(count=-1), dict(skip=-1)])
def test_windows_of_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="1 window or more|0 or more"):
        windows(Letters(), "abcdefgh" * 99, **{"length": 4, **bad})
    if "skip" not in bad:
        with pytest.raises(ValueError, match="1 window or more"):
            batches(Letters(), text="abcdefgh" * 99, **{"length": 4, **bad})


def test_calibration_windows_fit_into_the_context():
    class Short(Letters):
        model_max_length = 100

    class Model(torch.nn.Module):
        config = SimpleNamespace(n_positions=60)

    text = "abcdefgh" * 999
    lengths = [
        batches(tokenizer, text=text, model=model, **given)[0]["input_ids"].shape[1]
        for tokenizer, model, given in [
            (Letters(), None, {}), (Short(), None, {}), (Short(), Model(), {}), (Short(), Model(), {"length": 80})
        ]
    ]  # fmt: skip
    assert lengths == [512, 100, 60, 80], "a length that is given is the caller's"


def test_texts_that_cannot_be_read_are_refused_with_their_name(tmp_path):
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    (tmp_path / "empty").write_text(" \n")
    for name, words in [
        ("binary", "no UTF-8 text .at byte 3"),
        ("empty", "is empty"),
        ("no", "cannot be read: No such"),
    ]:
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            read_text(tmp_path / name)


def test_sentences_are_cut_at_the_context():
    class Pads:
        pad_token, model_max_length = "p", 10**30

        def __call__(self, group, **options):
            assert options["padding"] and options["truncation"] and options["padding_side"] == "right"
            return {"input_ids": torch.zeros(len(group), options["max_length"] or 50)}

    model = torch.nn.Linear(2, 2)
    assert sentence_batches(Pads(), ["a" * 50])[0]["input_ids"].shape[1] == 50
    model.config = SimpleNamespace(max_position_embeddings=32)
    assert sentence_batches(Pads(), ["a" * 50], model=model)[0]["input_ids"].shape[1] == 32


def test_sentences_are_from_all_over_the_text():
    every = [f"sentence number {n} of more than forty characters" for n in range(9)]
    text = ". ".join(["short", "x" * 300, *every, "short"])
    assert sentences(text=text) == every
    assert sentences(text=text, count=4) == [every[i] for i in (0, 2, 4, 6)]
    for bad in (dict(text="short. " * 9), dict(text=text, count=0)):
        with pytest.raises(ValueError, match="no sentence of 40 to 200 characters"):
            sentences(**bad)


def test_batches_hold_every_sentence():
    groups = []

    class Pads:
        pad_token = model_max_length = None

        def __call__(self, group, **options):
            groups.append(group)
            return {}

    tokenizer = Pads()
    with pytest.raises(ValueError, match="no padding token"):
        sentence_batches(tokenizer, ["a"])
    tokenizer.pad_token = "p"
    sentence_batches(tokenizer, list("abcdefg"), size=3)
    assert groups == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
