"""The lists of deliberate mistakes fit the sources of today; `make mutate` tries them."""

from __future__ import annotations

import pytest
from mutations.edit import ROOT, edits


def test_every_edit_changes_one_place_of_its_file():
    for edit in edits():
        text = (ROOT / edit.file).read_text()
        assert edit.apply(text) != text


def test_every_edit_names_tests_that_exist():
    for edit in edits():
        assert edit.tests, edit
        for test in edit.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file() and f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), edit


def test_a_text_that_occurs_twice_is_refused():
    first = edits()[0]
    with pytest.raises(ValueError, match="occurs 2 times"):
        first.apply(2 * (ROOT / first.file).read_text())
