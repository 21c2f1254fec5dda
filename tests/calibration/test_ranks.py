"""Ranks share whole blocks of batches, add up what they sum, and refuse what cannot be shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import Together

from qcompile.calibration import ranks as module
from qcompile.calibration.ranks import Ranks, RanksError
from qcompile.calibration.token_blocks import token_blocks


def batches_of(lengths):
    return [[torch.full((1, length), index)] for index, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 900), min_size=1, max_size=40), st.integers(1, 6))
def test_every_batch_is_on_one_rank_and_blocks_stay_whole(lengths, count):
    batches = batches_of(lengths)
    if len(batches) < count:
        with pytest.raises(RanksError, match=f"{len(batches)} batches cannot be shared by {count} ranks. Fix: more"):
            Ranks(0, count).share(batches)
        return
    shares = [Ranks(rank, count).share(batches) for rank in range(count)]
    assert [int(batch[0][0, 0]) for own, _ in shares for batch in own] == list(range(len(batches)))
    assert all(sum(sizes) == len(own) and own for own, sizes in shares)
    blocks = [size for _, sizes in shares for size in sizes]
    alone = token_blocks(batches)
    assert blocks == (alone if len(alone) >= count else [1] * len(batches))
    counts = [len(sizes) for _, sizes in shares]
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.floats(0.1, 100), max_size=40), st.integers(1, 5))
def test_owners_are_equally_busy(costs, count):
    owners = Ranks(0, count).owners(costs)
    assert owners == Ranks(count - 1, count).owners(costs) and len(owners) == len(costs)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(count)]
    assert max(loads) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


def test_a_process_alone_has_nobody_to_wait_for(monkeypatch):
    monkeypatch.setattr(module, "dist", None)  # is not asked for anything
    alone = Ranks()
    assert alone.is_first and alone.owners([1.0, 2.0]) == [0, 0]
    tensor = torch.tensor([1.0, torch.nan])
    alone.add(tensor)
    alone.raise_to_largest(tensor)
    alone.wait()
    alone.require_equal({"recipe": "x"})
    assert tensor[0] == 1.0 and bool(tensor[1].isnan())


@pytest.fixture
def three(monkeypatch):
    group = Together(3)
    monkeypatch.setattr(module, "dist", group)
    return group


def test_sums_and_maxima_are_over_all_ranks(three):
    def work(ranks):
        total = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
        largest = torch.tensor([[-3.0, -2.0, -9.0], [1.0, torch.nan, 2.0], [-torch.inf, 0.0, torch.inf]])[:, ranks.rank]
        largest = largest.contiguous()
        ranks.add(total)
        ranks.raise_to_largest(largest)
        ranks.wait()
        return total, largest

    for total, largest in three.run(work):
        assert total.tolist() == [6.0, 60.0]
        assert largest[0] == -2.0 and bool(largest[1].isnan()) and largest[2] == torch.inf


def test_ranks_with_other_arguments_are_named(three):
    def work(ranks):
        ranks.require_equal({"recipe": "same", "batches": "12" if ranks.rank == 2 else "10"})

    found = three.run(work)
    assert all(isinstance(error, RanksError) for error in found), "every rank stops"
    text = "rank 0 has the batches '10', and rank 2 '12'. Fix: start all ranks by one command"
    assert {str(error) for error in found} == {text}
    assert three.run(lambda ranks: ranks.require_equal({"recipe": "same"})) == [None] * 3


class Group:
    """What torch.distributed says of a process group."""

    def __init__(self, available=True, initialized=False):
        self.available, self.initialized, self.backends = available, initialized, []

    def is_available(self):
        return self.available

    def is_initialized(self):
        return self.initialized

    def init_process_group(self, backend):
        self.backends.append(backend)
        self.initialized = True

    def get_rank(self):
        return 1

    def get_world_size(self):
        return 4


@pytest.mark.parametrize(
    "group, variables, ranks, backends",
    [
        (Group(), {}, Ranks(), []),
        (Group(), {"WORLD_SIZE": "1", "RANK": "0"}, Ranks(), []),
        (Group(), {"WORLD_SIZE": "4"}, Ranks(), []),
        (Group(), {"WORLD_SIZE": "4", "RANK": "1"}, Ranks(1, 4), ["gloo"]),
        (Group(initialized=True), {}, Ranks(1, 4), []),
        (Group(initialized=True), {"WORLD_SIZE": "4", "RANK": "1"}, Ranks(1, 4), []),
        (Group(available=False), {"WORLD_SIZE": "4", "RANK": "1"}, Ranks(), []),
    ],
)
def test_what_torchrun_started_is_joined(monkeypatch, group, variables, ranks, backends):
    monkeypatch.setattr(module, "dist", group)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Ranks.joined() == ranks and group.backends == backends
