"""Norms as one operator each, with the sum in front of them if there is one.

RMSNorm                SimplifiedLayerNormalization, or of a sum SkipSimplifiedLayerNormalization
LayerNorm of a sum     SkipLayerNormalization, with the bias of a linear as its bias
other LayerNorms       stay: torch.onnx writes the standard LayerNormalization
"""

from __future__ import annotations

import torch
from torch import fx

from qcompile.analysis.norms import Norm, find_norms
from qcompile.codegen.onnx.fusions.packed_matmul import take_bias
from qcompile.codegen.onnx.ops.norm_ops import RMSNormCall, SkipLayerNormCall, SkipRMSNormCall
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten


def fuse_norms(program: Program, report: PassReport) -> None:
    """Rewrite in place: every RMSNorm, and every LayerNorm of a sum."""
    done: dict[str, list[str]] = {"rms": [], "layer": []}
    for index, norm in enumerate(find_norms(program)):
        if norm.kind == "rms":
            _fuse_rms_norm(program, norm, index)
        elif _is_sum(norm.input):
            _fuse_layer_norm(program, norm, index)
        else:
            continue
        done[norm.kind].append(norm.output.name)
    program.cleanup()
    report.done += [*done["rms"], *done["layer"]]
    report.notes.append(f"{len(done['rms'])} RMSNorms, {len(done['layer'])} LayerNorms of a sum")


def _fuse_rms_norm(program: Program, norm: Norm, index: int) -> None:
    gain = norm.gain
    if gain is None or norm.one_plus:
        gain = _add_gain(program, norm, index)
    x = norm.input
    if _is_sum(x):
        first, second = x.args
        fused = SkipRMSNormCall(first, second, gain, norm.eps).insert(program, after=x)
        out, total = program.unpack(fused, 2)
        norm.output.replace_all_uses_with(out)
        x.replace_all_uses_with(total, delete_user_cb=lambda user: user is not fused)
    else:
        last = max(x, gain)  # an input of the program stands before a gain that was just added
        norm.output.replace_all_uses_with(RMSNormCall(x, gain, norm.eps).insert(program, after=last))


def _fuse_layer_norm(program: Program, norm: Norm, index: int) -> None:
    total = norm.input
    first, second = total.args
    gain = norm.gain
    if gain is None:
        gain = _add_gain(program, norm, index)
    split = take_bias(program, first, {total})
    if split is None and (split := take_bias(program, second, {total})) is not None:
        first, second = second, first
    x, bias = split or (first, None)
    fused = SkipLayerNormCall(x, second, gain, norm.bias, bias, norm.eps).insert(program, after=total)
    out, new_total = program.unpack(fused, 2)
    norm.output.replace_all_uses_with(out)
    total.replace_all_uses_with(new_total)


def _add_gain(program: Program, norm: Norm, index: int) -> fx.Node:
    """The gain as it is multiplied, as a weight of its own."""
    return program.add_weight(f"gain_{index}", norm.gain_value(program).float())


def _is_sum(x: fx.Node) -> bool:
    """Whether a value is the sum of two of one shape, [B, T, C] or [T, C]: the operators take no other."""
    shapes = [n.meta["val"].shape for n in x.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return x.target is aten.add.Tensor and not x.kwargs and shapes[1:] == shapes[:1] and len(shapes[0]) in (2, 3)
