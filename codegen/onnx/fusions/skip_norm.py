"""Norms as one operator each, with the sum in front of them if there is one."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.analysis.norms import Norm, find_norms
from qcompile.codegen.onnx.fusions.packed_matmul import take_bias
from qcompile.ir.program import Program
from qcompile.recipe.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile_onnx


def rewrite_norms(program: Program, report: PassReport) -> None:
    """Rewrite in place: every RMSNorm, and every LayerNorm of a sum."""
    done: dict[str, list[str]] = {"rms": [], "layer": []}
    for index, norm in enumerate(find_norms(program)):
        replace = _replace_rms if norm.kind == "rms" else _replace_layer
        if replace(program, norm, index):
            done[norm.kind].append(norm.output.name)
    program.cleanup()
    report.done += [*done["rms"], *done["layer"]]
    report.notes.append(f"{len(done['rms'])} RMSNorms, {len(done['layer'])} LayerNorms of a sum")


def _replace_rms(program: Program, norm: Norm, index: int) -> bool:
    eps = _epsilon(norm)
    if eps is None:
        return False
    name = program.weight_name(norm.gain)
    if name is not None and not norm.one_plus:
        gain = norm.gain
    else:
        gain = program.add_weight(f"gain_{index}", norm.gain_value(program).float())
    x = norm.input
    if _is_sum(x):
        both = program.insert(ops.skip_rms_norm.default, (*x.args, gain, eps), after=x)
        out, total = program.unpack(both, 2)
        norm.output.replace_all_uses_with(out)
        x.replace_all_uses_with(total, delete_user_cb=lambda user: user is not both)
    else:
        norm.output.replace_all_uses_with(program.insert(ops.rms_norm.default, (x, gain, eps), after=x))
    return True


def _replace_layer(program: Program, norm: Norm, index: int) -> bool:
    total = norm.input
    if not _is_sum(total):  # the standard has an operator for it, which is what torch.onnx writes
        return False
    gain, first, second = norm.gain, *total.args
    if gain is None:
        gain = program.add_weight(f"gain_{index}", norm.gain_value(program).float())
    taken = take_bias(program, first, {total})
    if taken is None and (taken := take_bias(program, second, {total})) is not None:
        first, second = second, first
    product, bias = taken or (first, None)
    args = (product, second, gain, norm.bias, bias, norm.eps)
    both = program.insert(ops.skip_layer_norm.default, args, after=total)
    out, whole = program.unpack(both, 2)
    norm.output.replace_all_uses_with(out)
    total.replace_all_uses_with(whole)
    return True


def _is_sum(x: fx.Node) -> bool:
    """Whether a value is the sum of two of one shape, [B, T, C] or [T, C]: the operators know no other."""
    shapes = [n.meta["val"].shape for n in x.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return x.target is aten.add.Tensor and not x.kwargs and shapes[1:] == shapes[:1] and len(shapes[0]) in (2, 3)


def _epsilon(norm: Norm) -> float | None:
    """What is added to the mean square."""
    for node in norm.inner:
        if node.target is aten.rms_norm.default:
            return node.args[3] if len(node.args) > 3 else None
        if node.target is aten.rsqrt.default:
            added: float = node.args[0].args[1]
            return added
    return None
