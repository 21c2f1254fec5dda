"""Every quantized linear of a model by itself in the runtime of ExecuTorch, on what it reads in the model.

Alone, a site can differ from ours by the order of float sums, and by values whose codes may be rounded to either side:

    |found - ours| <= s_x sum_open |w| + e s_x sum_all (|q| + |z|) |w|

for each token and channel, where a value is open if x / s_x lies on the middle of two codes but for float32, or if its
code is the least or the greatest and the zero point lies there. XNNPACK sums products of int8 codes
q, and subtracts those of the zero point z in float32.
Source: XNNPACK, src/xnnpack/quantization.h.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.utils import unwrap_tensor_subclass

from qcompile.checkpoint.writers.executorch_program import run_program, write_program
from qcompile.checkpoint.writers.export_refusals import quantized_linears
from qcompile.checkpoint.writers.torchao_weights import intx_weight
from qcompile.modules.quant_linear import QuantLinear

MIDDLE = 5e-7  # of x / s_x, which both compute by three operations of float32
SUMS = 1e-6  # float32 sums in any order
_SHIFT = 128  # of our codes, 0 to 255, to those of int8
_TOGETHER = 30  # linears in a program


@dataclass
class Sites:
    """How a model's linears differ from ours, alone.

    Attributes:
        names: of those that were run.
        rows: how many tokens, over all linears.
        open_rows: those with at least one open value.
        moved_rows: those beyond the second term of the law: at least one open value got another code.
        worst: the largest difference, as a share of what the law allows.
        relative_error: the largest of a linear's tokens without an open value, of norms.
        beyond: linears that break the law.
    """

    names: list[str]
    rows: int = 0
    open_rows: int = 0
    moved_rows: int = 0
    worst: float = 0.0
    relative_error: float = 0.0
    beyond: tuple[str, ...] = ()


class _Alone(nn.Module):
    """Linears that read an input each."""

    def __init__(self, linears: dict[str, QuantLinear]) -> None:
        super().__init__()
        made = []
        for name, linear in linears.items():
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(intx_weight(name, linear), requires_grad=False)
            made.append(plain)
        self.linears = nn.ModuleList(made)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One product for each input."""
        return tuple(linear(x) for linear, x in zip(self.linears, inputs, strict=True))


def read_by_sites(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """What each quantized linear reads in a call of a model: path -> [tokens, K]."""
    read, hooks = dict[str, Tensor](), []
    for name, linear in quantized_linears(model).items():

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            read[name] = args[0].detach().flatten(0, -2).clone()

        hooks.append(linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(data)
    for hook in hooks:
        hook.remove()
    return read


def open_values(linear: QuantLinear, x: Tensor) -> Tensor:
    """Which values [S, K] may have another code."""
    codes, scale, _ = torch.ops.qcompile.quantize(x, str(linear.act))
    step = scale.double()
    ends = (codes == linear.act.qmin) | (codes == linear.act.qmax)
    least = x.double().amin(-1, keepdim=True).clamp(max=0) / step
    return _between_codes(x.double() / step) | (ends & _between_codes(least))


def compare_sites(model: nn.Module, data: Tensor) -> Sites:
    """Run all quantized linears of a model, and hold each to the law."""
    read, linears = read_by_sites(model, data), quantized_linears(model)
    names, found = list(linears), Sites(list(linears))
    for start in range(0, len(names), _TOGETHER):
        part = names[start : start + _TOGETHER]
        module, inputs = _Alone({name: linears[name] for name in part}), tuple(read[name] for name in part)
        unwrap_tensor_subclass(module)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "sites.pte"
            write_program(torch.export.export(module, inputs, strict=True), path, {})
            results = run_program(path, [inputs])[0]
        for name, theirs in zip(part, results, strict=True):
            _judge(found, name, linears[name], read[name], theirs)
    return found


def _judge(found: Sites, name: str, linear: QuantLinear, x: Tensor, theirs: Tensor) -> None:
    size = linear.weight.abs().T
    ours = linear.operand(x) @ linear.weight.T
    codes, scale, zero = torch.ops.qcompile.quantize(x, str(linear.act))
    unsure = open_values(linear, x)
    sums = (codes.float() - _SHIFT).abs() + (zero - _SHIFT).abs()
    either, order = scale * (unsure.float() @ size), SUMS * scale * (sums @ size)
    difference = (theirs - ours).abs()
    share = float((difference / (either + order).clamp(min=1e-30)).max())
    sure = ~unsure.any(-1)
    found.rows += len(x)
    found.open_rows += int((~sure).sum())
    found.moved_rows += int((difference > order).any(-1).sum())
    found.worst = max(found.worst, share)
    if bool(sure.any()):
        error = float(difference[sure].norm() / ours[sure].norm())
        found.relative_error = max(found.relative_error, error)
    if not share <= 1:  # NaN is not
        found.beyond += (name,)


def _between_codes(place: Tensor) -> Tensor:
    return ((place - place.floor()) - 0.5).abs() < MIDDLE * place.abs()
