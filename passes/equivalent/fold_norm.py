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
Skips:  streams that no rotation could take afterwards: a gain in a weight spreads the ranges of its columns, and only
        a rotation brings them together again. So either all norms of a stream are folded or none; what prevents it is
        named: norms whose output is read by something else than linears (post-norm residuals, routers of expert
        stacks), norms whose gain is used elsewhere too, tied weights, values that enter or leave the graph, linears
        that read the mean of a stream which LayerNorms subtract (a head without a last norm).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.analysis.facts import Facts
from qcompile.analysis.norms import Norm
from qcompile.analysis.obstacle import Obstacle
from qcompile.analysis.residual_stream import ResidualStream
from qcompile.analysis.scale_folding import find_consumers
from qcompile.analysis.sites import Site, find_sites
from qcompile.analysis.tied_weights import tied_obstacle, tied_table_obstacle
from qcompile.ir.aten_ops import aten
from qcompile.ir.node_meta import NO_MODULE, REPLACES_LAYER_NORM
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
    # Also fold norms of streams that no rotation can take: for a stream with gains of one size, or to look at.
    open_streams: bool = False


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
    """Fold the norms of every stream that a rotation can take then, in place."""
    report = PassReport("FoldNorm")
    sites = context.facts.sites
    kept = set[fx.Node]()
    for stream in context.facts.streams:
        norms = [norm for norm in stream.norms if norm.gain is not None and not norm.has_unit_gain(program)]
        obstacle = None if config.open_streams else _stream_obstacle(program, stream, norms, config, sites)
        if obstacle is not None and norms:
            label = f"{len(norms)} norms of the {stream.label}"
            report.skip(label, f"the stream could not be rotated then: {obstacle.reason}", obstacle.node)
            kept |= {norm.output for norm in stream.norms}
        for norm in norms if obstacle is None else ():
            obstacle_of_norm = _norm_obstacle(norm, sites)
            if obstacle_of_norm is None:
                _fold(program, norm, sites)
                report.done.append(norm.output.name)
                report.changed |= {n.name for n in norm.inner}
            else:
                report.skip(norm.output.name, obstacle_of_norm.reason, obstacle_of_norm.node)
    if config.center:
        for stream in Facts(program).streams:  # norms that were just folded have gain one now
            if any(norm.kind == "layer" and norm.output not in kept for norm in stream.norms):
                _center(program, stream, report)
    return report


def _stream_obstacle(
    program: Program, stream: ResidualStream, norms: list[Norm], config: FoldNorm, sites: list[Site]
) -> Obstacle | None:
    """Why a stream could not be rotated even if its norms were folded, or None.

    Args:
        program: where the stream is.
        stream: to be rotated.
        norms: those of its norms whose gain is not one.
        config: whether means can be folded.
        sites: all sites.
    """
    if stream.flow_obstacle is not None:
        return stream.flow_obstacle
    for norm in norms:
        obstacle = _norm_obstacle(norm, sites)
        if obstacle is not None:
            return obstacle
    layers = [norm for norm in stream.norms if norm.kind == "layer"]
    if layers and not config.center:
        return Obstacle(layers[0].output.name, "a LayerNorm subtracts a mean that is not folded")
    if layers and len(layers) < len(stream.norms):
        return Obstacle(layers[0].output.name, "the stream holds RMSNorms too: its mean matters to them")
    if layers and (obstacle := _mean_obstacle(stream)) is not None:
        return obstacle
    tied = tied_obstacle((*stream.consumers, *stream.producers))
    return tied or tied_table_obstacle(program, stream.tables, sites)


def _mean_obstacle(stream: ResidualStream) -> Obstacle | None:
    """The first linear that reads the mean of the stream, which LayerNorms subtract, or None."""
    produced = {site.node for site in stream.producers}
    without_mean = {norm.output for norm in stream.norms}
    for site in stream.consumers:
        work = [site.input]
        for value in work:  # grows by what the value is a sum or a view of
            if value in without_mean:
                continue
            sources = [] if value in produced else [node for node in value.all_input_nodes if node in stream.values]
            if not sources:
                return Obstacle(site.node.name, "it reads the stream without a norm: the mean matters to it")
            work += [source for source in sources if source not in work]
    return None


def _norm_obstacle(norm: Norm, sites: list[Site]) -> Obstacle | None:
    """What prevents that the gain and the shift of a norm fold into its consumers, or None."""
    consumers = find_consumers(norm.output, sites)
    if consumers.other_consumers:
        name = consumers.other_consumers[0].name
        return Obstacle(name, "its output is read by something that is not a linear")
    for weight in (norm.gain, norm.bias):
        if weight is not None and sum(u in norm.inner for u in weight.users) < len(weight.users):
            return Obstacle(weight.name, "its gain is used elsewhere too")
    tied = tied_obstacle(consumers.sites)
    if tied is not None:
        return tied
    for site in consumers.sites:
        if norm.bias is not None and len(site.node.args) < 3 and NO_MODULE in site.node.meta:
            return Obstacle(site.node.name, f"no module could hold a bias of {site.name}")
    return None


def _fold(program: Program, norm: Norm, sites: list[Site]) -> None:
    """Fold the gain and the shift of a norm into its consumers."""
    consumers = find_consumers(norm.output, sites)
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
    reader = _mean_obstacle(stream)
    if reader is not None:
        report.skip(f"mean of {layers[0].output.name}", reader.reason, reader.node)
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
