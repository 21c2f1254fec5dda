"""Groups of sites are solved once: by one rank, in this run or an earlier one."""

from __future__ import annotations

import pytest
import torch
from rank_threads import Kept, Together

from qcompile.calibration import ranks as ranks_module
from qcompile.recipe.solved_sites import SolvedSites, solve_each, solve_together


def parts(value):
    return SolvedSites([(torch.tensor([value]), torch.ones(1), None, None)])


def work_of(count, solved):
    def solve(index):
        solved.append(index)
        return parts(index)

    return [([f"site {index}"], lambda index=index: solve(index)) for index in range(count)]


def values(found):
    return [int(solved.parts[0][0]) for solved in found]


def on_ranks(monkeypatch, count, body):
    """What `body(ranks)` returns on each of several threads."""
    group = Together(count)
    monkeypatch.setattr(ranks_module, "dist", group)
    return group.run(body)


def test_without_a_place_to_keep_them_one_after_another_is_solved():
    solved = []
    found = solve_each(None, work_of(3, solved))
    assert int(next(found).parts[0][0]) == 0 and solved == [0], "the next is solved when it is asked for"
    assert values(found) == [1, 2] and solved == [0, 1, 2]


def test_what_an_earlier_run_kept_is_not_solved_again():
    solved, kept = [], Kept(earlier=[("site 1",)])
    kept.shared["site 1",] = parts(100)
    assert values(solve_each(kept, work_of(4, solved))) == [0, 100, 2, 3]
    assert solved == [0, 2, 3] and len(kept.shared) == 4


@pytest.mark.parametrize("count, earlier", [(2, []), (3, [("site 0",), ("site 4",)]), (4, [("site 1",)])])
def test_ranks_share_what_is_to_be_solved(monkeypatch, count, earlier):
    shared, solved = {sites: parts(int(sites[0][5:])) for sites in earlier}, [[] for _ in range(count)]

    def body(ranks):
        kept = Kept(ranks, shared, earlier)
        return values(solve_each(kept, work_of(7, solved[ranks.rank])))

    assert on_ranks(monkeypatch, count, body) == [list(range(7))] * count
    sizes = [len(own) for own in solved]
    assert sorted(index for own in solved for index in own) == [i for i in range(7) if (f"site {i}",) not in earlier]
    assert max(sizes) - min(sizes) <= 1


def test_the_owner_solves_what_all_gathered(monkeypatch):
    shared, told = {}, [[] for _ in range(3)]

    def body(ranks):
        kept = Kept(ranks, shared)

        def solve(is_owner):
            told[ranks.rank].append(is_owner)
            return parts(7) if is_owner else None

        return values([solve_together(kept, ["a", "b"], 1, solve)])

    assert on_ranks(monkeypatch, 3, body) == [[7]] * 3
    assert told == [[False], [True], [False]] and list(shared) == [("a", "b")]


def test_together_alone_and_from_an_earlier_run():
    told = []

    def solve(is_owner):
        told.append(is_owner)
        return parts(3)

    assert values([solve_together(None, ["a"], 5, solve)]) == [3] and told == [True]
    kept = Kept(earlier=[("a",)])
    kept.shared["a",] = parts(9)
    assert values([solve_together(kept, ["a"], 0, solve)]) == [9] and told == [True], "nothing is gathered either"
    assert values([solve_together(kept, ["b"], 0, solve)]) == [3] and ("b",) in kept.shared
