"""QuantizeKV: keys and values of every attention in 4 or 8 bits, one scale and zero for each head and token.

Source: QServe, arXiv:2405.04532 sec. 4.2 (asymmetric, dynamic, keys after the rotary embedding);
        Hadamard on queries and keys: QuaRot, arXiv:2404.00456 stage 1d. The mean of keys taken out:
        SageAttention, arXiv:2410.02367 sec. 4.2 (there of the call at hand, here of the calibration).
Law:    k ~ s (q - z) within s for each channel of a head and token; with `hadamard` H k is rounded
        instead, and q k^T = (H q)(H k)^T. With `center` k - c is rounded and c added back, for a
        constant c of each head: keys have a mean that is larger than what tells tokens apart.
Needs:  nothing; with `center` the mean key of every head.   Leaves: nothing. In a graph the
        rounding stands before the attention; on a module it is done by the cache that every call
        then gets (qcompile/kv_cache.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.attention_flow import products
from qcompile.calibrate import Statistics
from qcompile.formats import Format
from qcompile.hadamard import rotation
from qcompile.passes.quantize import EXACT
from qcompile.program import Program
from qcompile.recipe import RecipeError, rewrites
from qcompile.report import PassReport

aten = torch.ops.aten
ops = torch.ops.qcompile


@dataclass(frozen=True)
class QuantizeKV:
    """Bits of keys and values; `hadamard` turns keys first, `center` takes their mean out before that;
    `intact` first tokens stay float.
    """

    bits: int = 4
    hadamard: bool = False
    intact: int = 0
    center: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"QuantizeKV: bits must be 4 or 8, got {self.bits}")
        if self.intact < 0:
            raise RecipeError(f"QuantizeKV: intact counts tokens, got {self.intact}")

    @property
    def format(self) -> Format:
        """Of a head's vector."""
        return Format("int4" if self.bits == 4 else "int8", "row", zero="int")


@rewrites(
    QuantizeKV,
    exact=False,
    needs=lambda how: ("keys",) if how.center else (),
    after=(*EXACT, "IntactKV"),
)
def quantize_kv(program: Program, how: QuantizeKV, seen: Statistics) -> PassReport:
    """Insert the rounding before every attention, in place."""
    report = PassReport("QuantizeKV")
    for index, product in enumerate(products(program)):
        keys, values = product.keys, product.values
        center = None
        if how.center:
            report.tensors[f"{index}.center"] = mean = seen.key_means[keys.name]
            center = program.add_weight(f"keys.{index}.center", mean.to(keys.meta["val"].device))
        if product.turned:
            keys = program.insert(aten.transpose.int, (keys, -1, -2), before=product.node)
        turned = _round(program, keys, how, product.node, turn=how.hadamard, center=center)
        if product.turned:
            turned = program.insert(aten.transpose.int, (turned, -1, -2), before=product.node)
        rounded = _round(program, values, how, product.reader, turn=False)
        _replace_argument(product.node, 1, turned)
        _replace_argument(product.reader, product.values_at, rounded)
        report.done.append(product.node.name)
    report.notes.append(f"{len(report.done)} attentions, {how.format}")
    return report


def _round(
    program: Program,
    x: torch.fx.Node,
    how: QuantizeKV,
    before: torch.fx.Node,
    *,
    turn: bool,
    center: torch.fx.Node | None = None,
) -> torch.fx.Node:
    form, dtype, intact = how.format, x.meta["val"].dtype, how.intact
    args = [x]
    if turn:
        width = int(x.meta["val"].shape[-1])
        name = f"keys{width}.turn"
        if name not in program.weights:
            program.add_weight(name, rotation(width, 0)[0].float().to(x.meta["val"].device))
        args.append(program.node_of(name))
    if center is not None:
        args.append(center)

    def run(x: Tensor, *more: Tensor) -> Tensor:
        wide, rest = x.float(), list(more)
        matrix = rest.pop(0) if turn else None
        mean = rest.pop(0)[:, None] if rest else None  # [H, 1, D]
        wide = wide if mean is None else wide - mean
        codes, scale, zero = ops.quantize(wide if matrix is None else wide @ matrix, str(form))
        numbers = ops.dequantize(codes, scale, zero, None, str(form), 0, torch.float32)
        back = numbers if matrix is None else numbers @ matrix.t()
        back = (back if mean is None else back + mean).to(dtype)
        if not intact:
            return back
        position = torch.arange(x.shape[-2], device=x.device)[:, None]
        return torch.where(position < intact, x, back)

    done: torch.fx.Node = program.inline(run, args, before=before)
    return done


def _replace_argument(node: torch.fx.Node, at: int, new: torch.fx.Node) -> None:
    node.args = (*node.args[:at], new, *node.args[at + 1 :])
