"""JSON that is damaged, or says one thing twice, ends in one sentence; the rest is read as json reads it."""

from __future__ import annotations

import json
import os

import pytest

from qcompile.recipe.strict_json import DamagedJson, read_json


def test_what_json_writes_is_read(tmp_path):
    data = {"a": [1, 2.5, None, True, "ü"], "b": {"a": {}}, "c": 10**40}
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert read_json(tmp_path / "x.json") == data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b"\xff\xfe", "can't decode"),
        (b"[" * 200_000, "nests too deeply"),
        (b'{"a": ' * 200_000, "nests too deeply"),
        (b"1" * 10_000, "Exceeds the limit"),
        (b"[1e999]", "1e999 is beyond float64"),
        (b"[NaN]", "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
    ],
)
def test_damage_is_one_line_with_the_file(content, words, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedJson, match=f"x.json is damaged .*{words}") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        with pytest.raises(DamagedJson, match="is no file"):
            read_json(tmp_path / name)
