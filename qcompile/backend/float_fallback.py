"""Sites that are kept float because, at their M, no quantized kernel is as fast as the float matmul.

On a CPU committed measurements decide (codegen/cpu/cpu_kernel_choice.py), on a GPU what `qcompile kernels tune`
measured there (codegen/triton/gpu_kernel_choice.py).
"""

from __future__ import annotations

import torch
from torch import fx

from qcompile.analysis.facts import Facts
from qcompile.codegen.cpu.cpu_kernel_choice import choose_cpu_kernel
from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.codegen.rows import rows_label, rows_of
from qcompile.numerics.format import Format
from qcompile.passes.qdq.site_plan import Quantize, formats_of
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule

_OVERRIDE = "(options={'on_slow_kernel': 'quantize'} quantizes it)"


def float_fallback_sites(
    facts: Facts, recipe: Recipe, rules: dict[str, Rule | None], device: torch.device | None, rows: int | None
) -> dict[str, str]:
    """Sites whose kernel is slower than the float matmul.

    Args:
        facts: of the program, as captured.
        recipe: to be applied.
        rules: its rules, resolved for the program's sites.
        device: the GPU that the weights are on; None for a CPU.
        rows: M at which every site is judged; None takes each site's M in this graph's example.

    Returns:
        weight name -> reason, for the report.
    """
    config = next((c for c in recipe.passes if isinstance(c, Quantize)), None)
    reasons: dict[str, str] = {}
    if config is None:
        return reasons
    for site in facts.sites:
        weight, act = formats_of(site, config, rules[site.name])
        m, dtype = rows or rows_of(site.input)[0], site.node.meta["val"].dtype
        if site.kind == "experts":
            choice = _choose_for_experts(device, weight, str(act) if act else "", dtype, site.K)
        else:
            choice = _choose(device, weight, str(act) if act else "", dtype, m, site.K, site.N)
        if choice.slower_than_float:
            reasons[site.name] = f"{choice} at {_rows_label(site.input, rows)}: slower than float {_OVERRIDE}"
    return reasons


def _choose(
    device: torch.device | None, weight: Format, act: str, dtype: torch.dtype, m: int, k: int, n: int
) -> KernelChoice:
    """The kernel of x [M, K] times a weight [N, K] on a device; None is the CPU."""
    if device is None:
        return choose_cpu_kernel(weight, act, dtype, m, k, n)
    from qcompile.codegen.triton.gpu_kernel_choice import choose_gpu_kernel
    from qcompile.codegen.triton.launch.gemm import gpu

    return choose_gpu_kernel(gpu(device), weight, act, dtype, m, k, n)


def _choose_for_experts(
    device: torch.device | None, weight: Format, act: str, dtype: torch.dtype, k: int
) -> KernelChoice:
    """The kernel of routed rows times a stack of experts on a device; None is the CPU, which has none."""
    if device is None:
        return KernelChoice("dequantize, then a product for each expert", has_kernel=False)
    from qcompile.codegen.triton.gpu_kernel_choice import choose_experts_kernel
    from qcompile.codegen.triton.launch.gemm import gpu

    return choose_experts_kernel(gpu(device), weight, act, dtype, k)


def _rows_label(x: fx.Node, rows: int | None) -> str:
    return rows_label(x) if rows is None else f"rows {rows} (option)"
