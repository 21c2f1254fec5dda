"""Processes that share a calibration, as torchrun starts them; a process alone is the same with nobody to wait for.

Each rank runs its share of the batches through the whole program, reading one weight at a time. Sums over tokens are
added up over the ranks; what follows from them (codes) one rank computes and the others read from a shared folder.
Nothing here starts, restarts or places processes: torchrun does, or what sets its variables (docs/guides/scale.md).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qcompile.calibration.token_blocks import token_blocks


class RanksError(ValueError):
    """Ranks that cannot work together; the text names what differs and the fix."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share its work.

    Attributes:
        rank: its place, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @staticmethod
    def joined() -> Ranks:
        """The ranks of the process group; torchrun's, joined now, where none is; else this process alone."""
        if not dist.is_available():
            return Ranks()
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(_leave)
        if not dist.is_initialized():
            return Ranks()
        return Ranks(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, batches: Sequence[Sequence[Any]]) -> tuple[list[Sequence[Any]], list[int]]:
        """The batches of this rank: whole blocks (token_blocks.py), as equal as they can be.

        Args:
            batches: all of them, in the same order on every rank.

        Returns:
            The batches, and how many each block has.

        Raises:
            RanksError: fewer batches than ranks.
        """
        if self.count > 1 and len(batches) < self.count:
            raise RanksError(
                f"{len(batches)} batches cannot be shared by {self.count} ranks. Fix: more batches, or "
                f"--nproc-per-node {max(1, len(batches))}"
            )
        sizes = token_blocks(batches)
        if len(sizes) < self.count:  # sums are then of other products: codes may differ where two are as good
            sizes = [1] * len(batches)
        first, last = (len(sizes) * rank // self.count for rank in (self.rank, self.rank + 1))
        start, own = sum(sizes[:first]), sizes[first:last]
        return list(batches[start : start + sum(own)]), own

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def raise_to_largest(self, tensor: Tensor) -> None:
        """Replace a tensor by its maximum over all ranks; NaN counts as largest."""
        if self.count > 1:
            nan = tensor.isnan().to(torch.int32)
            dist.all_reduce(tensor.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf), dist.ReduceOp.MAX)
            dist.all_reduce(nan, dist.ReduceOp.MAX)
            tensor[nan.bool()] = torch.nan

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.count > 1:
            dist.barrier()

    def require_equal(self, what: dict[str, str]) -> None:
        """Check that all ranks were started with the same arguments.

        Raises:
            RanksError: with the name, the values and the ranks.
        """
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, what)
        for name in what:
            values = [other[name] for other in found]
            if len(set(values)) > 1:
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                raise RanksError(
                    f"rank 0 has the {name} {values[0]!r:.100}, and rank {other} {values[other]!r:.100}. "
                    "Fix: start all ranks by one command"
                )

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who solves what: the rank of each piece of work, in order, so that all are equally busy.

        Args:
            costs: of the pieces; for GPTQ K^3 + N K^2 of a weight [N, K].
        """
        loads = [0.0] * self.count
        found = []
        for cost in costs:
            owner = loads.index(min(loads))
            loads[owner] += cost
            found.append(owner)
        return found


def _leave() -> None:
    """Leave the process group that was joined here."""
    if dist.is_initialized():
        dist.destroy_process_group()
