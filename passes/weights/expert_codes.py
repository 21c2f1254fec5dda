"""The codes of stacks of experts by an algorithm that reads second moments: each expert by its own rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.calibration.hessian import Gram
from qcompile.calibration.layerwise_run import LayerwiseRun
from qcompile.calibration.ranks import Ranks
from qcompile.ir.program import Program
from qcompile.memory.stored_tensor import loaded
from qcompile.numerics.qtensor import QTensor
from qcompile.passes.qdq.insert_qdq import matrix_of
from qcompile.passes.qdq.site_plan import PlannedSite
from qcompile.passes.weights.choice import Choose
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
    return SolvedSites([codes.stored_parts for codes, _ in found], [name for _, names in found for name in names])


def _codes_of_stack(
    program: Program,
    run: LayerwiseRun,
    planned: PlannedSite,
    choose: Choose,
    finished: FinishedSites | None,
    is_owner: bool,
) -> tuple[QTensor, list[str]] | None:
    """Codes of a stack [E N, K], each expert's by the rows that are routed to it, and the experts that fell back.

    An expert that no row reached has a Hessian of zeros: every algorithm then rounds to nearest.
    """
    site, found, fallbacks = planned.site, list[QTensor](), list[str]()
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
            choice = choose(weight.float(), sums.whole(), planned.weight)
            solved[label] = SolvedSites([choice.codes.stored_parts], [label] if choice.fell_back else [])
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
        found.append(QTensor.from_stored(loaded(own.parts[0]), planned.weight, site.K))
        fallbacks += own.fell_back
    zeros = [_as_rows(q.zero) for q in found if q.zero is not None]
    group_scales = [q.group_scale for q in found if q.group_scale is not None]
    whole = QTensor(
        torch.cat([q.codes for q in found]),
        torch.cat([_as_rows(q.scale) for q in found]),
        torch.cat(zeros) if zeros else None,
        torch.cat(group_scales) if group_scales else None,
        planned.weight,
    )
    return whole, fallbacks


def _as_rows(part: Tensor) -> Tensor:
    """One scale for a whole matrix, as a row of its own."""
    return part if part.ndim else part.reshape(-1, 1)
