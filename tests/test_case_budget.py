"""Which cases the shorter runs keep: as many as they are given, always the same, and one of every function."""

from __future__ import annotations

import pytest
from case_budget import LISTED, RUNS, budget, chosen, kept, lines, timed

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


@pytest.mark.parametrize("minutes, slow", [(0.1, 1), (1.6, 1), (2.6, 2), (3.6, 3), (99, 3)])
def test_a_budget_is_kept_to_and_no_function_is_left_out(times, minutes, slow):
    found = budget(times, minutes)
    assert found[SLOW] == slow and found["tests/ir/test_b.py::test_one"] == 1


def test_what_is_whole_in_both_runs_is_not_listed(times):
    assert lines(times, 2.6) == [f"0 2 {SLOW}", "0 1 tests/ir/test_b.py::test_one"]


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
    assert all(count > 0 for count in kept("test").values()), "every function keeps a case"
