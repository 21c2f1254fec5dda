"""Fold norms: move gains, shifts and means of norms into the linears around them.

Source: the weight fusion that every rotation needs (SliceGPT arXiv:2401.15024 sec. 3.2, QuaRot
        arXiv:2404.00456 sec. 4, stage 1a).
Law:    gain    W diag(g) (x/r)  =  W (g * x/r)                 W[:, j] *= g_j, g := 1
        shift   W (y + b) + c    =  W y + (c + W b)             c += W b, b := 0
        mean    LayerNorm(x) = RMSNorm(x - mean x): when every producer of the stream gives values of
                mean zero (W -= mean over rows, c -= mean c, tables -= row mean) the mean is zero
                and the LayerNorm *is* an RMSNorm.
Keeps:  the output; computed in float64, cast once.
Needs:  nothing.
Skips:  norms whose output is read by something else than linears (post-norm residuals, routers of
        expert stacks), norms whose gain is used elsewhere too, tied weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.analysis.facts import Facts
from qcompile.analysis.norms import Norm
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.residual_stream import ResidualStream
from qcompile.analysis.scale_folding import find_consumers
from qcompile.analysis.sites import Site, find_sites
from qcompile.analysis.tied_weights import tied_obstacle, tied_table_obstacle
from qcompile.ir.aten_ops import aten
from qcompile.ir.node_meta import REPLACES_LAYER_NORM
from qcompile.ir.program import Program
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.registry import Stage, rewrites
from qcompile.recipe.report import PassReport


@dataclass(frozen=True)
class FoldNorm(PassConfig):
    """Fold gains and shifts into the consumers and, where a stream allows it, means into the producers."""

    # Replace LayerNorms by RMSNorms, by centering what the producers give to the stream. Off: LayerNorms stay.
    center: bool = True


def scale_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """W [N, K], scale [K] -> W diag(scale), in float64, cast back."""
    return (weight.double() * scale.double().to(weight.device)).to(weight.dtype)


def center_rows(weight: Tensor) -> Tensor:
    """W [N, K] -> W minus the mean over its N outputs: what it gives has mean zero. Also b [N]."""
    wide = weight.double()
    return (wide - wide.mean(0, keepdim=True)).to(weight.dtype)


def center_table(table: Tensor) -> Tensor:
    """Rows [.., n] -> each minus its own mean."""
    wide = table.double()
    return (wide - wide.mean(-1, keepdim=True)).to(table.dtype)


@rewrites(FoldNorm, Stage.FOLD, exact=True)
def fold_norm(program: Program, config: FoldNorm, context: PassContext) -> PassReport:
    """Fold every norm that can be folded, in place."""
    report = PassReport("FoldNorm")
    sites = context.facts.sites
    for norm in context.facts.norms:
        if norm.gain is None or norm.has_unit_gain(program):
            continue
        obstacle = _fold(program, norm, sites)
        if obstacle is None:
            report.done.append(norm.output.name)
            report.changed |= {n.name for n in norm.inner}
        else:
            report.skip(norm.output.name, obstacle.reason, obstacle.node)
    if config.center:
        for stream in Facts(program).streams:  # norms that were just folded have gain one now
            if any(norm.kind == "layer" for norm in stream.norms):
                _center(program, stream, report)
    return report


def _fold(program: Program, norm: Norm, sites: list[Site]) -> Obstacle | None:
    """Fold the gain and the shift of a norm into its consumers, or say what prevents it."""
    consumers = find_consumers(norm.output, sites)
    if consumers.other_consumers:
        name = consumers.other_consumers[0].name
        return Obstacle(name, "its output is read by something that is not a linear")
    if not consumers.sites:
        return Obstacle(norm.output.name, "nothing reads its output")
    for weight in (norm.gain, norm.bias):
        if weight is not None and sum(u in norm.inner for u in weight.users) < len(weight.users):
            return Obstacle(weight.name, "its gain is used elsewhere too")
    tied = tied_obstacle(consumers.sites)
    if tied is not None:
        return tied
    gain = norm.gain_value(program)
    shift_name = program.weight_name(norm.bias)
    for site in consumers.sites:
        if shift_name is not None and bool(program.weights[shift_name].any()):
            shift = program.weights[site.name].double() @ program.weights[shift_name].double()
            add_to_bias(program, site, shift)
        program.weights[site.name] = scale_columns(program.weights[site.name], gain)
    norm.set_gain(program, torch.ones_like(gain))
    if shift_name is not None:
        program.weights[shift_name] = torch.zeros_like(program.weights[shift_name])
    return None


def add_to_bias(program: Program, site: Site, shift: Tensor) -> None:
    """Add [N] to the bias of a site, giving it one if it has none."""
    name = program.weight_name(site.node.args[2]) if len(site.node.args) > 2 else None
    if name is None:
        weight = program.weights[site.name]
        bias_name = site.name.removesuffix("weight") + "bias"
        bias = program.add_weight(bias_name, shift.to(weight.dtype))
        site.node.args = (site.node.args[0], site.node.args[1], bias)
    else:
        program.weights[name] = (program.weights[name].double() + shift).to(program.weights[name].dtype)


def _center(program: Program, stream: ResidualStream, report: PassReport) -> None:
    """Center all that is written to a stream, and replace its LayerNorms by RMSNorms."""
    layers = [norm for norm in stream.norms if norm.kind == "layer"]
    if stream.obstacle is not None:
        reason = f"its stream cannot be centered: {stream.obstacle.reason}"
        report.skip(f"mean of {layers[0].output.name}", reason, stream.obstacle.node)
        return
    if len(layers) < len(stream.norms):
        report.skip(layers[0].output.name, "the stream holds RMSNorms too: its mean matters to them")
        return
    tied = tied_obstacle(stream.producers) or tied_table_obstacle(program, stream.tables, find_sites(program))
    if tied is not None:
        report.skip(f"mean of {layers[0].output.name}", tied.reason, tied.node)
        return
    for site in stream.producers:
        program.weights[site.name] = center_rows(program.weights[site.name])
        bias = program.weight_name(site.node.args[2]) if len(site.node.args) > 2 else None
        if bias is not None:
            program.weights[bias] = center_table(program.weights[bias])
    for table in stream.tables:
        name = program.weight_name(table)
        assert name is not None
        program.weights[name] = center_table(program.weights[name])
    for norm in layers:
        node = norm.output
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        rms = program.insert(aten.rms_norm.default, (node.args[0], node.args[1], None, eps), before=node)
        rms.meta[REPLACES_LAYER_NORM] = program.weight_name(norm.gain)
        program.replace(node, rms)
        program.graph.erase_node(node)
        report.done.append(f"{norm.output.name} -> RMSNorm")
    report.changed |= {value.name for value in stream.values}
