"""A user's file, checked by `mypy --strict` against the installed package (see test_packaging.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import qcompile
from qcompile import Format, NothingToQuantize, QTensor, QuantLinear, Recipe, RecipeError, Report, Rule
from qcompile.passes import GPTQ, Fuse, Quantize, SmoothQuant, Untie


def recipe() -> Recipe:
    int4 = Format.parse("int4/group128/zero")
    passes = (Untie(), SmoothQuant(alpha=0.5), GPTQ(int4, None, act_order=True, damp_percent=0.01), Fuse())
    return Recipe("mine", passes).with_rules([Rule("*.0.*", keep=True), Rule("*", weight=Format("int8"))])


def small(model: nn.Module, batches: list[dict[str, Tensor]], folder: Path) -> float:
    try:
        report: Report = qcompile.quantize(model, recipe(), batches, progress=False)
    except (RecipeError, NothingToQuantize) as error:
        raise SystemExit(str(error)) from error
    qcompile.save(model, folder)
    again: nn.Module = qcompile.load(folder)
    linears = [module for module in again.modules() if isinstance(module, QuantLinear)]
    return report.bytes_after / max(1, report.bytes_before) if linears else 1.0


def rounded(x: Tensor) -> Tensor:
    q: QTensor = qcompile.quantize_tensor(x, Format("int8"))
    return q.dequantize(torch.float32)


def export(model: nn.Module, folder: str) -> dict[str, object]:
    report = qcompile.export_onnx(model, folder, "int4-cpu", low_memory=True, contrib_ops=False)
    return dict(report.to_json())


CONFIG: Quantize = Quantize(Format("int8"), act=None)
NAMES: list[str] = sorted(qcompile.PRESETS)
