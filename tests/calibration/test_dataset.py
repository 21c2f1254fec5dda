"""Calibration data of a data set: rows become one stream of tokens, and what is no text is refused with its row."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calibration.dataset import DataError, DataRows, dataset_batches

END = 3


class Letters:
    """A tokenizer of characters, whose template names the speakers."""

    eos_token_id = END
    chat_template = "yes"

    def __call__(self, text, *, add_special_tokens, **_):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"{said['role'][0]}:{said['content']};" for said in messages)


class Bare(Letters):
    eos_token_id = None
    chat_template = None


def written(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ids(text):
    return [ord(c) for c in text]


def stream(found):
    return torch.cat([batch["input_ids"][0] for batch in found]).tolist()


@given(st.lists(st.text("abc \n", max_size=9), min_size=1, max_size=12), st.integers(1, 7), st.integers(1, 9))
def test_windows_are_the_rows_in_their_order(tmp_path_factory, texts, length, count):
    path = written(tmp_path_factory.mktemp("d") / "a.jsonl", *({"text": text} for text in texts))
    whole = [token for text in texts if text.strip() for token in (*ids(text), END)]
    if len(whole) < length:
        with pytest.raises(DataError, match=f"has {len(whole)} tokens, one window needs {length}. Fix: give more rows"):
            dataset_batches(Letters(), path, length=length, count=count)
        return
    found = dataset_batches(Letters(), path, length=length, count=count)
    assert stream(found) == whole[: min(count, len(whole) // length) * length]
    assert all(batch["input_ids"].shape == (1, length) and batch["input_ids"].dtype == torch.int64 for batch in found)
    assert stream(dataset_batches(Letters(), DataRows.open(path), length=length, count=count)) == stream(found)


def test_conversations_are_written_by_the_template(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = written(tmp_path / "a.jsonl", {"text": "ignored", "messages": talk}, {"messages": talk[:1]})
    assert DataRows.open(path).column == "messages"
    assert stream(dataset_batches(Letters(), path, length=1)) == ids("u:hi;a:yo;u:hi;"), "the template ends them itself"
    assert stream(dataset_batches(Letters(), DataRows.open(path, "text"), length=1)) == [*ids("ignored"), END]
    with pytest.raises(DataError, match="has conversations, and this tokenizer no chat template. Fix: give rows with"):
        dataset_batches(Bare(), path, length=1)


def test_a_tokenizer_without_an_end_token_adds_none(tmp_path):
    path = written(tmp_path / "a.jsonl", {"text": "ab"}, "", {"text": None}, {"text": "  "}, {"text": "c"})
    assert stream(dataset_batches(Bare(), path, length=1)) == ids("abc")


def test_rows_behind_the_last_window_are_not_read(tmp_path):
    path = written(tmp_path / "a.jsonl", {"text": "abcd"}, "no JSON")
    assert stream(dataset_batches(Letters(), path, length=4, count=1)) == ids("abcd")
    with pytest.raises(DataError, match="line 2 of .*a.jsonl is no JSON .*Fix: write one object a line"):
        dataset_batches(Letters(), path, length=4, count=2)


def test_the_default_length_is_the_context(tmp_path):
    class Short(Letters):
        model_max_length = 7

    path = written(tmp_path / "a.jsonl", {"text": "abcdefgh" * 99})
    assert dataset_batches(Short(), path)[0]["input_ids"].shape == (1, 7)
    assert dataset_batches(Letters(), path)[0]["input_ids"].shape == (1, 512)
    for bad in ({"length": 0}, {"count": 0}):
        with pytest.raises(ValueError, match="1 window or more"):
            dataset_batches(Letters(), path, **{"length": 4, **bad})


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "is empty. Fix: give rows"),
        (["", "  "], "is empty"),
        (
            [{"prompt": "a", "answer": "b"}],
            "the columns 'prompt', 'answer', and none is 'messages' or 'text'. Fix",
        ),
        (["[1, 2]"], "line 1 of .* is list, no object"),
        (["{"], "line 1 of .* is no JSON"),
    ],
)
def test_files_without_rows_or_columns_are_refused_when_opened(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        DataRows.open(written(tmp_path / "a.jsonl", *rows))


@pytest.mark.parametrize(
    "value, words",
    [
        (5, "row 2 of .*: 'text' is '5', no text and no list of messages"),
        (["a"], "row 2 of .*no text and no list"),
        ([], "row 2 of .*no text and no list"),
        ([{"from": "user"}], "row 2 of .*: the chat template refuses it .KeyError"),
    ],
)
def test_a_row_without_text_is_named(tmp_path, value, words):
    path = written(tmp_path / "a.jsonl", {"text": "a"}, {"text": value})
    with pytest.raises(DataError, match=words):
        dataset_batches(Letters(), path, length=9)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="missing.jsonl cannot be read: No such file.*Fix: check the path"):
        DataRows.open(tmp_path / "missing.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="is no UTF-8 text .*Fix: convert it"):
        DataRows.open(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="the columns 'text', and none is 'other'"):
        DataRows.open(written(tmp_path / "c.jsonl", {"text": "a"}), "other")


def test_the_library_is_asked_for_everything_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"org/name needs it. Fix: pip install 'torch-qcompile\[data\]', or give"):
        DataRows.open("org/name")
    assert DataRows.open(written(tmp_path / "a.jsonl", {"text": "a"})).column == "text", "JSON lines need nothing"


@pytest.fixture
def library():
    return pytest.importorskip("datasets")


def test_files_and_folders_of_the_library(tmp_path, library):
    rows = library.Dataset.from_dict({"text": ["ab", "c"]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "b.csv").write_text("text,label\nab,1\nc,2\n")
    (tmp_path / "d.json").write_text('[{"text": "ab"}, {"text": "c"}]')
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "train.jsonl", {"text": "ab"}, {"text": "c"})
    for place in ("a.parquet", "saved", "b.csv", "d.json", "folder"):
        found = stream(dataset_batches(Letters(), tmp_path / place, length=1))
        assert found == [*ids("ab"), END, *ids("c"), END], place
    with pytest.raises(DataError, match="has no known kind. Fix: name a .jsonl"):
        DataRows.open(written(tmp_path / "a.xyz", "1"))
    with pytest.raises(DataError, match="the columns 'label', and none is 'messages' or 'text'"):
        (tmp_path / "e.csv").write_text("label\n1\n")
        DataRows.open(tmp_path / "e.csv")


def test_a_name_has_a_configuration_and_a_split(library, monkeypatch):
    calls = []

    def load_dataset(path, config=None, **options):
        calls.append((path, config, options["split"], options["streaming"]))
        return [{"text": "abc"}]

    monkeypatch.setattr(library, "load_dataset", load_dataset)
    for name in ("org/name", "org/name:small", "org/name@test", "org/name:small@test"):
        assert stream(dataset_batches(Bare(), name, length=3)) == ids("abc")
    assert [call[:3] for call in calls] == [
        ("org/name", None, "train"), ("org/name", "small", "train"), ("org/name", None, "test"),
        ("org/name", "small", "test"),
    ]  # fmt: skip
    assert all(call[3] for call in calls), "no more is read than is needed"
    with pytest.raises(DataError, match="a:b:c is no name of a data set. Fix: write NAME, NAME:CONFIG"):
        DataRows.open("a:b:c")


def test_a_data_set_that_cannot_be_had_is_named(library):
    with pytest.raises(DataError, match="the data set no-such/thing cannot be read .*Fix: NAME, NAME:CONFIG"):
        DataRows.open("no-such/thing")  # tests are offline
