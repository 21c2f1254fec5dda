"""How much memory a streamed run will take, before it begins: what is largest at a time, not what the model is.

Each term counts what is alive at once; benches/streamed_memory.py compares the plan with the peak of a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from qcompile.analysis.facts import Facts
from qcompile.analysis.sites import Site
from qcompile.ir.program import Program
from qcompile.memory.process import available_bytes
from qcompile.passes import Quantize
from qcompile.passes.weights.gptq import GPTQ, rows_at_once
from qcompile.recipe.recipe import Recipe

_FIXED = 800e6  # Python, libraries, graph and modules
_WEIGHT_COPIES = 4  # of a site in float32, while it is rounded
_HESSIANS = 2.5  # matrices [K, K] of float64: the Hessian, its factor, and what is made of that


class TooLittleMemory(ValueError):
    """A site, or the values of a batch, need more memory than a run may take."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a streamed run takes.

    Attributes:
        site: the site that takes most, with those that are solved together with it.
        solving: for that site: its weights, and Hessians.
        table: the largest table or weight, as it is read and converted.
        values: of all batches together, where all run layer by layer: the residual stream and a site's input.
        outputs: of one batch, of the float and the quantized model, compared in float64.
        offloads: whether the values of batches go to files, so that they do not count.
    """

    site: str
    solving: int
    table: int
    values: int
    outputs: int
    offloads: bool = False

    @staticmethod
    def of(facts: Facts, recipe: Recipe, batches: Sequence[Sequence[Tensor]]) -> MemoryPlan:
        """Plan a run.

        Args:
            facts: of the captured program.
            recipe: to be run.
            batches: flat inputs of the program; empty if the recipe needs none.
        """
        program = facts.program
        sequential = any(isinstance(config, GPTQ) for config in recipe.passes)
        quantizes = any(isinstance(config, Quantize) for config in recipe.passes)
        groups: dict[fx.Node | str, list[Site]] = defaultdict(list)
        for site in facts.sites:
            groups[site.input if sequential else site.name].append(site)
        costs = {sites[0].name: _solving(program, sites, sequential) for sites in groups.values()} if quantizes else {}
        largest = max(costs, key=lambda name: costs[name], default="")
        table = max((2 * weight.nbytes + 4 * weight.numel() for weight in program.weights.values()), default=0)
        tokens = [max((t.shape[:2].numel() for t in batch if t.ndim), default=0) for batch in batches]
        layerwise = sequential or bool(recipe.needs)
        values = sum(tokens) * _widest(facts) if layerwise else 0
        outputs = max(tokens, default=16) * _output_bytes(program)
        return MemoryPlan(largest, costs.get(largest, 0), table, values, outputs)

    @property
    def peak(self) -> int:
        """The most at one time."""
        stages = (self.solving, self.table, self.outputs)
        return int(_FIXED + max(stages) + (0 if self.offloads else self.values))

    @property
    def _largest(self) -> str:
        """What decides the peak, for a message."""
        if self.solving >= max(self.table, self.outputs):
            return self.site
        return "the largest table" if self.table > self.outputs else "comparing the outputs of one batch"

    def within(self, limit: int | None) -> MemoryPlan:
        """The plan that keeps to a limit.

        Args:
            limit: bytes; None: what the machine has free, which decides whether values go to files and refuses nothing.

        Raises:
            TooLittleMemory: even with values in files it takes more.
        """
        allowed = available_bytes() if limit is None else limit
        if self.peak <= allowed:
            return self
        offloaded = replace(self, offloads=True)
        if limit is not None and offloaded.peak > limit:
            raise TooLittleMemory(
                f"{_gb(limit)} are too little: {self._largest} needs {_gb(offloaded.peak)}. "
                f"Fix: memory of at least {_gb(offloaded.peak)}, shorter batches, or a recipe that reads no inputs"
            )
        return offloaded

    def __str__(self) -> str:
        """One line for a user."""
        parts = [f"{_gb(self.solving)} for {self.site}"] if self.solving else []
        parts += [f"{_gb(self.values)} for batches{' go to files' if self.offloads else ''}"] if self.values else []
        return f"needs about {_gb(self.peak)} of memory ({', '.join(parts)}); {_gb(available_bytes())} are free"


def _solving(program: Program, sites: Sequence[Site], sequential: bool) -> int:
    weights = [program.weights[site.name] for site in sites]
    elements = sum(weight.numel() for weight in weights)
    if not sequential:
        return _WEIGHT_COPIES * 4 * elements
    k = sites[0].K
    pieces = min(elements, rows_at_once(k) * k)
    return int(_HESSIANS * 8 * k * k) + 4 * elements + 2 * elements + 8 * 4 * pieces


def _widest(facts: Facts) -> int:
    """Bytes of one token at a stop: the residual stream, and the widest input of a site."""
    k = max((site.K for site in facts.sites), default=0)
    residual = max((stream.size for stream in facts.streams), default=k)
    itemsize = max((site.node.meta["val"].element_size() for site in facts.sites), default=4)
    return (residual + k) * itemsize


def _output_bytes(program: Program) -> int:
    """Bytes of one token of the outputs: of four runs, and twice in float64."""
    widths = [v.meta["val"].shape[-1] for v in program.outputs if isinstance(v, fx.Node) and v.meta["val"].ndim]
    itemsize = max((v.meta["val"].element_size() for v in program.outputs if isinstance(v, fx.Node)), default=4)
    return sum(int(width) for width in widths if isinstance(width, int)) * (4 * itemsize + 16)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
