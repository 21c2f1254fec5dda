"""Ranks that are threads of one process: what torch.distributed does for them."""

from __future__ import annotations

import threading

import torch

from qcompile.calibration.ranks import Ranks


class Together:
    """torch.distributed for ranks that are threads of one process."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, count):
        self.count, self.place = count, threading.local()
        self.barrier_of_all, self.given = threading.Barrier(count, timeout=30), [None] * count

    def exchange(self, value):
        self.given[self.place.rank] = value
        self.barrier_of_all.wait()
        found = list(self.given)
        self.barrier_of_all.wait()
        return found

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM):
        stack = torch.stack(self.exchange(tensor.clone()))
        tensor.copy_(stack.sum(0) if op == self.ReduceOp.SUM else stack.amax(0))

    def all_gather_object(self, found, value):
        found[:] = self.exchange(value)

    def barrier(self):
        self.barrier_of_all.wait()

    def run(self, work):
        """What `work(ranks)` returns or raises, rank by rank."""
        found = [None] * self.count

        def body(rank):
            self.place.rank = rank
            try:
                found[rank] = work(Ranks(rank, self.count))
            except Exception as error:  # of a test, which looks at it
                found[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Kept:
    """Solved sites that the ranks of a test share; none is solved twice."""

    def __init__(self, ranks=Ranks(), shared=None, earlier=()):  # noqa: B008  it is frozen
        self.ranks, self.shared, self.earlier = ranks, {} if shared is None else shared, set(earlier)

    def has(self, sites):
        return tuple(sites) in self.earlier

    def find(self, sites):
        return self.shared[tuple(sites)]

    def add(self, sites, solved):
        assert tuple(sites) not in self.shared, "solved twice"
        self.shared[tuple(sites)] = solved
