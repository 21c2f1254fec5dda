"""Sites that stay float because, at their rows, no quantized product is as fast as the float one.

On a CPU a committed table says it (codegen/cpu/cpu_kernel_choice.py), on a GPU what `qcompile kernels tune` measured there
(codegen/triton/gpu_kernel_choice.py).
"""

from __future__ import annotations

import torch
from torch import fx

from qcompile.analysis.sites import find_sites
from qcompile.codegen.cpu.cpu_kernel_choice import choose as choose_for_cpu
from qcompile.codegen.rows import regime, rows_of
from qcompile.ir.program import Program
from qcompile.passes.qdq.site_plan import Quantize, formats_of
from qcompile.recipe.recipe import Recipe

_KEEP = "(options={'on_slow_kernel': 'quantize'} quantizes it)"


def float_fallback_sites(
    program: Program, recipe: Recipe, device: torch.device | None, rows: int | None
) -> dict[str, str]:
    """Sites whose best way is slower than float.

    Args:
        program: as captured. recipe: to be applied, with its rules.
        device: the GPU that the weights are on; None for a CPU.
        rows: of x, that every site is judged at; None takes those of this graph's example.

    Returns:
        weight name -> why, for the report.
    """
    config = next((c for c in recipe.passes if isinstance(c, Quantize)), None)
    found: dict[str, str] = {}
    if config is None:
        return found
    rules = recipe.resolve(dict.fromkeys(s.name for s in find_sites(program)))
    for site in find_sites(program):
        weight, act = formats_of(site, config, rules[site.name])
        if site.kind == "experts":
            found[site.name] = f"experts have no fast kernel yet: float is faster {_KEEP}"
            continue
        how = (weight, str(act) if act else "", site.node.meta["val"].dtype, rows or rows_of(site.input)[0])
        if device is None:
            choice = choose_for_cpu(*how, site.K, site.N)
        else:
            from qcompile.codegen.triton.gpu_kernel_choice import choose as choose_for_gpu
            from qcompile.codegen.triton.launch.gemm import gpu

            choice = choose_for_gpu(gpu(device), *how, site.K, site.N)
        if choice.slower_than_float:
            found[site.name] = f"{choice} at {_judged(site.input, rows)}: slower than float {_KEEP}"
    return found


def _judged(x: fx.Node, rows: int | None) -> str:
    return regime(x) if rows is None else f"rows {rows} (option)"
