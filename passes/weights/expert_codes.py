"""The codes of stacks of experts by an algorithm that reads second moments: each expert by its own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qcompile.calibration.hessian import Gram
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.ir.program import Program
from qcompile.memory.stored_tensor import loaded
from qcompile.numerics.qtensor import QTensor, StoredParts
from qcompile.passes.qdq.insert_qdq import matrix_of
from qcompile.passes.qdq.site_plan import PlannedSite
from qcompile.passes.weights.choice import Choose, damage
from qcompile.recipe.solved_sites import FinishedSites, SolvedSites


def expert_codes(
    program: Program,
    run: LayerwiseRun,
    members: list[PlannedSite],
    choose: Choose,
    finished: FinishedSites | None,
    is_owner: bool,
) -> SolvedSites | None:
    """The codes of stacks that read one input; each rank solves some experts.

    Args:
        program: what is quantized.
        run: stopped at the stacks.
        members: stacks, with their formats.
        choose: the algorithm.
        finished: keeps the experts that other ranks solve; None: this process is alone.
        is_owner: whether this rank puts the experts together; others return None.
    """
    stacks = [_codes_of_stack(program, run, planned, choose, finished, is_owner) for planned in members]
    found = [stack for stack in stacks if stack is not None]
    if not is_owner:
        return None
    return SolvedSites(
        [part for stack in found for part in stack.parts],
        [name for stack in found for name in stack.fell_back],
        _mean([stack.damage for stack in found]),
    )


def _codes_of_stack(
    program: Program,
    run: LayerwiseRun,
    planned: PlannedSite,
    choose: Choose,
    finished: FinishedSites | None,
    is_owner: bool,
) -> SolvedSites | None:
    """Codes of a stack [E N, K], each expert's by the rows that are routed to it, and the experts that fell back.

    An expert that no row reached has a Hessian of zeros: every algorithm then rounds to nearest.
    """
    site, found, fallbacks, damages = planned.site, list[QTensor](), list[str](), list[tuple[float, float] | None]()
    ends = [value.tolist() for value in run.values_of(site.node.all_input_nodes[2])] if site.grouped else []

    def rows_of(expert: int) -> Iterator[Tensor]:
        for batch, (x, tokens) in enumerate(zip(run.values_of(site.input), run.tokens_along(site.input), strict=True)):
            if site.batched:
                own: int | slice = expert
            else:
                own = slice(int(ends[batch][expert - 1]) if expert else 0, int(ends[batch][expert]))
            yield x[own] if tokens is None else x[own][tokens[own]]

    ranks = Ranks() if finished is None else finished.ranks
    weights = loaded(matrix_of(program, site)).split(site.N)
    labels = [f"{site.name}[{expert}]" for expert in range(len(weights))]
    solved: dict[str, SolvedSites] = {}
    for expert, (label, weight) in enumerate(zip(labels, weights, strict=True)):
        sums = Gram(site.K, weight.device)
        for rows in rows_of(expert):
            sums.add(rows.float())
        ranks.add(sums.sums)
        if expert % ranks.count == ranks.rank:
            weight, hessian = weight.float(), sums.whole()
            choice = choose(weight, hessian, planned.weight)
            measured = damage(weight, hessian, choice.codes) if bool(hessian.any()) else None
            solved[label] = SolvedSites([choice.codes.stored_parts], [label] if choice.fell_back else [], measured)
            if finished is not None and ranks.count > 1:
                finished.add([label], solved[label])
    ranks.wait()
    if not is_owner:
        return None
    for label in labels:
        own = solved.get(label)
        if own is None:
            assert finished is not None
            own = finished.find([label])
        found.append(QTensor.from_stored(_on(weights[0].device, own.parts[0]), planned.weight, site.K))
        fallbacks += own.fell_back
        damages.append(own.damage)
    zeros = [_as_rows(q.zero) for q in found if q.zero is not None]
    group_scales = [q.group_scale for q in found if q.group_scale is not None]
    whole = QTensor(
        torch.cat([q.codes for q in found]),
        torch.cat([_as_rows(q.scale) for q in found]),
        torch.cat(zeros) if zeros else None,
        torch.cat(group_scales) if group_scales else None,
        planned.weight,
    )
    return SolvedSites([whole.stored_parts], fallbacks, _mean(damages))


def _mean(damages: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Of those that were measured."""
    measured = [pair for pair in damages if pair is not None]
    if not measured:
        return None
    nearest, chosen = (sum(part) / len(measured) for part in zip(*measured, strict=True))
    return nearest, chosen


def _on(device: torch.device, parts: StoredParts) -> StoredParts:
    """Values of parts on a device: those of another rank are read from a file."""
    codes, scale, *rest = (part if part is None else loaded(part).to(device) for part in parts)
    assert codes is not None and scale is not None
    return codes, scale, rest[0], rest[1]


def _as_rows(part: Tensor) -> Tensor:
    """One scale for a whole matrix, as a row of its own."""
    return part if part.ndim else part.reshape(-1, 1)
