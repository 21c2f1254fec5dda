"""Lower the dialect of a Program to ATen and the operators of native_kernels.py, for Inductor.

A site's rows are the product of the leading dimensions of its input; the report judges a symbolic
number at the size that the compiler saw first. The operators themselves look at the rows they get.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.codegen import aten_fallback as aten
from qcompile.codegen.cpu import traced_kernels as kernels
from qcompile.codegen.cpu.cpu_kernel_choice import CpuChoice, choose
from qcompile.codegen.rows import regime, rows_of
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember
from qcompile.numerics.format import Format

ops = torch.ops.qcompile


def lower(program: Program, remember: Remember) -> dict[str, dict[str, str]]:
    """Rewrite every dialect node in place.

    Args:
        program: after fuse.
        remember: see weight_cache.py: prepared tensors are made once whatever the number of graphs.

    Returns:
        site name -> regime -> kernel, for the report.
    """
    chosen: dict[str, dict[str, str]] = {}
    for node in list(program.graph.nodes):
        if node.target is ops.qlinear.default:
            chosen.setdefault(_site(program, node), {})[regime(node)] = str(_qlinear(program, node, remember))
    aten.lower_rest(program)
    program.cleanup()
    return chosen


def _site(program: Program, node: fx.Node) -> str:
    return (program.weight_name(node.args[3]) or node.name).removesuffix(".codes")


def _qlinear(program: Program, node: fx.Node, remember: Remember) -> CpuChoice:
    x, x_scale, x_zero, stored, scale, zero, group_scale, bias, text, act, k, dtype = node.args
    form = Format.parse(text)
    n = int(stored.meta["val"].shape[0])
    choice = choose(form, act, dtype, rows_of(node)[0], k, n)
    build = _BUILDERS.get(choice.kernel)
    if build is None:
        out = program.inline(
            functools.partial(aten.product, form=form, act=act, columns=k, dtype=dtype),
            (x, x_scale, x_zero, stored, scale, zero, group_scale, bias),
            before=node,
        )
    else:
        out = build(program, node, form, remember)
    node.replace_all_uses_with(out)
    return choice


# -- one builder for each kernel: which prepared tensors it reads, and what it inlines -------------


def _weights(program: Program, node: fx.Node) -> list[Any]:
    """The tensors behind (weight, scale, zero, group_scale); None where absent."""
    return [None if a is None else program.weights[program.weight_name(a) or ""] for a in node.args[3:7]]


def _prepared(
    program: Program, node: fx.Node, kernel: str, remember: Remember, make: Callable[[], tuple[Tensor, ...]]
) -> list[fx.Node]:
    name = program.weight_name(node.args[3]) or node.name
    held = [tensor for tensor in _weights(program, node) if tensor is not None]
    found = []
    for index, tensor in enumerate(remember(kernel, held, make)):
        full = f"{name}.{kernel}.{index}"
        found.append(program.node_of(full) if full in program.weights else program.add_weight(full, tensor))
    return found


def _int8_mm(program: Program, node: fx.Node, form: Format, remember: Remember) -> fx.Node:
    def run(x: Tensor, x_scale: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.int8_mm(x, x_scale, w, scale, bias, dtype)

    dtype: torch.dtype = node.args[11]
    x, x_scale, _, w, scale, _, _, bias = node.args[:8]
    return program.inline(run, (x, x_scale, w, scale, bias), before=node)


def _int8_float(program: Program, node: fx.Node, form: Format, remember: Remember) -> fx.Node:
    def run(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.finish(kernels.int8_float(x, w), scale, bias, dtype)

    dtype: torch.dtype = node.args[11]
    x, _, _, w, scale, _, _, bias = node.args[:8]
    return program.inline(run, (x, w, scale, bias), before=node)


def _dual_mm(program: Program, node: fx.Node, form: Format, remember: Remember) -> fx.Node:
    stored, _, _, steps = _weights(program, node)
    k: int = node.args[10]
    dtype: torch.dtype = node.args[11]

    def run(x: Tensor, x_scale: Tensor, q: Tensor, gs: Tensor, z: Tensor, s: Tensor, b: Tensor | None) -> Tensor:
        return kernels.dual_mm(x, x_scale, q, gs, z, s, b, dtype)

    x, x_scale, _, _, scale, zero, group_scale, bias = node.args[:8]
    if zero is None:
        nibbles, group_scale, zero = _prepared(
            program, node, "symmetric nibbles", remember, lambda: kernels.prepare_symmetric(stored, steps, form, k)
        )
    else:
        (nibbles,) = _prepared(program, node, "nibbles", remember, lambda: (kernels.prepare_nibbles(stored, form, k),))
    return program.inline(run, (x, x_scale, nibbles, group_scale, zero, scale, bias), before=node)


def _nibble_float(program: Program, node: fx.Node, form: Format, remember: Remember) -> fx.Node:
    stored, scale, zero, group_scale = _weights(program, node)
    k: int = node.args[10]
    dtype: torch.dtype = node.args[11]

    def make() -> tuple[Tensor, ...]:
        return kernels.prepare_nibbles(stored, form, k), *kernels.group_offsets(
            group_scale if form.dual else scale, zero
        )

    def run(x: Tensor, q: Tensor, a: Tensor, c: Tensor, s: Tensor, b: Tensor | None) -> Tensor:
        return kernels.finish(kernels.nibble_float(x, q, a, c), s if form.dual else torch.ones(1), b, dtype)

    nibbles, a, c = _prepared(program, node, "affine nibbles", remember, make)
    return program.inline(run, (node.args[0], nibbles, a, c, node.args[4], node.args[7]), before=node)


_BUILDERS: dict[str, Callable[[Program, fx.Node, Format, Remember], fx.Node]] = {
    "int8_mm": _int8_mm,
    "dual_mm": _dual_mm,
    "int8_float": _int8_float,
    "nibble_float": _nibble_float,
}
