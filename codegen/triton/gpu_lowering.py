"""Lower the dialect of a Program to the operators of triton_ops.py, and fuse what stands around them.

    qlinear, x in numbers        linear_w       int2, int3, int4, int8 weights in rows or groups
    qlinear, x in codes          linear_a8      int8 x int8 (also the int8 that dual-grained int4 is), fp8 x fp8
    any other                    plain ATen     dequantize and multiply
    product + low-rank correction, + residual   the product's epilogue
    what stands before a quantize               row_quant, with it (fuse_row_quant.py)

What a value is read by decides: a product that somebody else reads too keeps its own node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.codegen import aten_fallback as plain
from qcompile.codegen.rows import regime, rows_of
from qcompile.codegen.triton import triton_ops as _register  # noqa: F401  registers torch.ops.qcompile_triton
from qcompile.codegen.triton.fuse_row_quant import alike, quantize_rows
from qcompile.codegen.triton.gpu_kernel_choice import NONE, GpuChoice, choose, kind_of
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.ir.program import Program
from qcompile.memory.weight_cache import Remember
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import int8_codes, load_codes

aten = torch.ops.aten
ops = torch.ops.qcompile
kernels = torch.ops.qcompile_triton

Make = Callable[[], tuple[Tensor | None, ...]]
_PRODUCTS = (kernels.linear_w.default, kernels.linear_a8.default)
_EXTRA = slice(5, 8)  # residual, low and up among the arguments of both


def lower(program: Program, remember: Remember, here: Gpu | None = None) -> dict[str, dict[str, str]]:
    """Rewrite every dialect node in place.

    Args:
        program: after fuse. remember: see weight_cache.py. here: the GPU; None is one of sm_90 that nothing was measured on.

    Returns:
        site name -> regime -> kernel, for the report.
    """
    chosen: dict[str, dict[str, str]] = {}
    here = here or Gpu()
    for node in list(program.graph.find_nodes(op="call_function", target=ops.qlinear.default)):
        site = (program.weight_name(node.args[3]) or node.name).removesuffix(".codes")
        chosen.setdefault(site, {})[regime(node)] = _product(program, node, remember, here)
    for target in _PRODUCTS:
        for node in list(program.graph.find_nodes(op="call_function", target=target)):
            _fuse_epilogue(program, node)
    quantize_rows(program, here.capability)
    plain.lower_rest(program)
    program.cleanup()
    return chosen


# -- products ------------------------------------------------------------------------------------------


def _product(program: Program, node: fx.Node, remember: Remember, here: Gpu) -> str:
    """Put what computes a site in its place; its name, and how it was measured to compare with float."""
    form, act, columns, dtype = Format.parse(node.args[8]), *node.args[9:]
    chosen = choose(here, form, act, dtype, rows_of(node)[0], columns, int(node.args[3].meta["val"].shape[0]))
    kind = kind_of(form, act, dtype, here.capability) if program.weight_name(node.args[3]) is not None else ""
    if kind == "numbers":
        out = _of_numbers(program, node, form, remember)
    elif kind == "codes":
        out = _of_codes(program, node, form, remember)
    else:
        run = functools.partial(plain.product, form=form, act=act, columns=columns, dtype=dtype)
        out, chosen = program.inline(run, node.args[:8], before=node), GpuChoice(NONE, has_kernel=False)
    node.replace_all_uses_with(out)
    program.graph.erase_node(node)
    return str(chosen)


def _of_numbers(program: Program, node: fx.Node, form: Format, remember: Remember) -> fx.Node:
    x, bias, text, columns = node.args[0], node.args[7], node.args[8], node.args[10]
    codes, scale, zero, group_scale = held = _held(program, node)
    made = _prepared(
        program, node, "linear_w", remember, held, lambda: prepare(codes, scale, zero, group_scale, form, columns)
    )
    packed, scales, zeros = (*made, None)[:3]
    args = (x, packed, scales, zeros, bias, None, None, None, text, columns)
    return program.insert(kernels.linear_w.default, args, before=node)


def _of_codes(program: Program, node: fx.Node, form: Format, remember: Remember) -> fx.Node:
    x, x_scale, _, weight, row_scale, _, _, bias = node.args[:8]
    if form.dual:
        codes, _, zero, group_scale = held = _held(program, node)

        def make() -> tuple[Tensor]:
            return (int8_codes(load_codes(codes, form, node.args[10]), zero, group_scale, form),)

        (weight,) = _prepared(program, node, "int8", remember, held, make)
    args = (x, x_scale, weight, row_scale, bias, None, None, None, node.args[11])
    return program.insert(kernels.linear_a8.default, args, before=node)


def _held(program: Program, node: fx.Node) -> list[Any]:
    """Codes, scale, zero point and group scale of a site; None where absent."""
    return [None if a is None else program.weights[program.weight_name(a) or ""] for a in node.args[3:7]]


def _prepared(
    program: Program, node: fx.Node, kind: str, remember: Remember, held: list[Any], make: Make
) -> list[fx.Node]:
    """What a kernel reads of a site, as weights of the program; made once for equal sites."""

    def there() -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in make() if tensor is not None)

    name, found = program.weight_name(node.args[3]), []
    for index, tensor in enumerate(remember(kind, [t for t in held if t is not None], there)):
        full = f"{name}.{kind}.{index}"
        found.append(program.node_of(full) if full in program.weights else program.add_weight(full, tensor))
    return found


def _fuse_epilogue(program: Program, node: fx.Node) -> None:
    """The only readers of a product that add something of its shape: a correction first, then a residual."""
    for take in (_low_rank, _residual):
        users = list(node.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
            return
        add = users[0]
        other = add.args[1] if add.args[0] is node else add.args[0]
        if not isinstance(other, fx.Node) or other is node or not alike(other, node):
            return
        extra = take(program, other)
        if extra is None:
            continue
        args = list(node.args)
        args[_EXTRA] = [old if new is None else new for old, new in zip(args[_EXTRA], extra, strict=True)]
        fused = program.insert(node.target, args, before=add)
        add.replace_all_uses_with(fused)
        program.graph.erase_node(add)
        program.graph.erase_node(node)
        node = fused


def _low_rank(program: Program, other: fx.Node) -> tuple[Any, ...] | None:
    """linear(low, up) with a small inner dimension -> (no residual, low, up)."""
    if other.target is not aten.linear.default or len(other.args) > 2 or len(other.users) != 1:
        return None
    low, up = other.args
    return (None, low, up) if up.meta["val"].shape[1] <= 256 else None


def _residual(program: Program, other: fx.Node) -> tuple[Any, ...] | None:
    return other, None, None
