"""The folder of a run beside its output: what decides its result, and what it finished."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompile.analysis.facts import Facts
from qcompile.api.memory_plan import MemoryPlan
from qcompile.calibration.ranks import Ranks
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.finished_folder import FinishedFolder
from qcompile.checkpoint.tensor_file import digest
from qcompile.recipe.recipe import Recipe
from qcompile.version import VERSION


@dataclass(frozen=True)
class Workspace:
    """The folder of a run beside its output.

    Attributes:
        path: of the folder.
        source: files of the model.
        resume: whether to go on with what is there.
        ranks: the processes that share the run.
        memory: bytes that a run may take; None: what is free.
        say: is told what a run will take, before it begins.
    """

    path: Path
    source: Sequence[Path]
    resume: bool
    ranks: Ranks
    memory: int | None = None
    say: Callable[[str], None] = lambda text: None

    def plan(self, facts: Facts, recipe: Recipe, batches: Sequence[Sequence[Tensor]]) -> MemoryPlan:
        """What a run will take, told before it begins.

        Args:
            facts: of the captured program.
            recipe: as it will run.
            batches: flat inputs.

        Raises:
            TooLittleMemory: it needs more than it may take.
        """
        own = batches[: -(-len(batches) // self.ranks.count)] if recipe.needs else []
        plan = MemoryPlan.of(facts, recipe, own).within(self.memory)
        self.say(str(plan))
        return plan

    def begin(self, model: nn.Module, recipe: Recipe, batches: Sequence[Sequence[Tensor]]) -> FinishedFolder:
        """Open the folder for a run.

        Args:
            model: to be quantized.
            recipe: as it will run.
            batches: flat inputs.

        Raises:
            CheckpointError: it has an earlier run and `resume` is off, or another run; a file of the model is gone.
        """
        sums = [digest(tensor.cpu().contiguous()) for batch in batches for tensor in batch]
        gone = [file for file in self.source if not file.is_file()]
        if gone:
            raise CheckpointError(f"{gone[0]} is not there any more. Fix: restore it, and run again")
        files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.source]
        dtype, device = next(((str(p.dtype), p.device.type) for p in model.parameters() if p.ndim > 1), ("", ""))
        run = {
            "recipe": json.dumps(recipe.to_json(), sort_keys=True),
            "model": f"{type(model).__name__} {json.dumps(files)}",
            "dtype": dtype,
            "device": device,  # sums are in another order elsewhere
            "batches": f"{len(batches)} of {zlib.crc32(' '.join(sums).encode()):08x}",
            "versions": f"qcompile {VERSION}, torch {torch.__version__}",
        }
        finished = FinishedFolder(self.path, run, resume=self.resume, ranks=self.ranks)
        if self.resume:
            self.say(f"{finished.earlier} groups of sites are finished in {self.path}: the run goes on behind them")
        return finished
