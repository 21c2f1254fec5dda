"""Which cases the shorter runs keep: always the same, and none of functions that take long."""

from __future__ import annotations

from pathlib import Path

import pytest
from case_budget import ENDS, LISTED, LONG, RUNS, budget, chosen, kept, lines, timed

ROOT = Path(__file__).parents[1]

REPORT = """<testsuites><testsuite>
<testcase classname="tests.ir.test_a" name="test_fast[1]" time="0.01"/>
<testcase classname="tests.ir.test_a" name="test_fast[2]" time="0.01"/>
<testcase classname="tests.ir.test_a.TestGroup" name="test_slow[x[0]]" time="50"/>
<testcase classname="tests.ir.test_a.TestGroup" name="test_slow[x[1]]" time="70"/>
<testcase classname="tests.ir.test_a.TestGroup" name="test_slow[x[2]]" time="60"/>
<testcase classname="tests.ir.test_b" name="test_one" time="30"/>
</testsuite></testsuites>"""
SLOW = "tests/ir/test_a.py::TestGroup::test_slow"


@pytest.fixture
def times(tmp_path):
    (tmp_path / "times.xml").write_text(REPORT)
    return timed(tmp_path / "times.xml")


def test_cases_are_added_up_by_function(times):
    assert times == {
        "tests/ir/test_a.py::test_fast": [0.01, 0.01],
        SLOW: [50, 70, 60],
        "tests/ir/test_b.py::test_one": [30],
    }


@pytest.mark.parametrize("seconds, kept", [(0.001, 1), (0.5, 1), (4, 2), (99, 3)])
def test_every_function_keeps_a_case_and_as_many_as_take_some_seconds(seconds, kept):
    assert budget({"a": [1, 2, 3]}, seconds) == {"a": kept}


def test_of_long_functions_only_those_from_end_to_end_are_kept(times):
    assert budget(times) == {"tests/ir/test_a.py::test_fast": 2, SLOW: 0, "tests/ir/test_b.py::test_one": 0}
    end = min(ENDS)
    assert budget({end: [LONG, LONG]}) == {end: 1} and budget({"another": [LONG]}) == {"another": 0}


def test_what_is_whole_in_both_runs_is_not_listed(times):
    assert lines(times) == [f"0 0 {SLOW}", "0 0 tests/ir/test_b.py::test_one"]
    before = ["0 9 tests/ir/test_a.py::test_fast", "0 0 tests/ir/test_a.py::test_not_run"]
    assert lines(times, before)[1:3] == ["2 2 tests/ir/test_a.py::test_fast", before[1]]


def test_a_case_is_chosen_by_its_name_alone():
    cases = [f"a.py::test[{index}]" for index in range(20)] + ["a.py::other[1]", "b.py::test[1]"]
    few = chosen(cases, {"a.py::test": 3, "a.py::other": 0})
    assert (
        len(few) == 4 and "b.py::test[1]" in few and few == chosen(reversed(cases), {"a.py::test": 3, "a.py::other": 0})
    )
    assert few < chosen(cases, {"a.py::test": 4}) and chosen(cases, {}) == set(cases)


def test_the_list_is_one_that_both_runs_read():
    assert LISTED.read_text()
    for run in RUNS:
        assert kept(run) and all(count >= 0 and "::test" in name for name, count in kept(run).items())
    for name in ENDS:
        file, _, function = name.partition("::")
        assert f"def {function.rpartition('::')[2]}(" in (ROOT / file).read_text(), name
    assert all(kept("test").get(name, 1) > 0 for name in ENDS)
