"""Random arguments of the CPU operators, and what a call must give, worked out from the arguments alone.

Packed weights are read here by the index formulas that codegen/cpu/native/linear.h draws.
"""

from __future__ import annotations

import itertools

import torch

from qcompile.codegen.cpu import weight_packing as packing

INT8_OPS = ("int8_linear", "dual_linear", "group_linear")
EXACT_OPS = ("int8_linear", "dual_linear")
OPS = (*INT8_OPS, "table_linear", "int8_float_linear")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CENTERED = torch.arange(16.0) - 8  # what codes of table_linear mean, unless a test says so
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def ints(low, high, *shape, dtype=torch.uint8):
    """low .. high, both included."""
    return torch.randint(low, high + 1, shape).to(dtype)


def operands(
    op, rows, k, n, group=32, *, x=None, dtype=torch.float32, bias=True, zero="bytes", step="floats", table=None
):
    """Arguments by name, in the order of the schema.

    Args:
        op: name of the operator.
        rows: M, or leading sizes of x.
        k: K.
        n: N.
        group: columns of a group.
        x: dtype of x; None: int8 where the operator takes it, else float32.
        dtype: of the result.
        bias: whether there is one.
        zero: of group_linear and table_linear: None, "bytes" or "floats".
        step: of the same: "bytes" or "floats".
        table: [16] of table_linear; None: CENTERED.
    """
    lead = (rows,) if isinstance(rows, int) else tuple(rows)
    x = x or (torch.int8 if op in INT8_OPS else torch.float32)
    codes = x == torch.int8
    a = {"x": ints(-128, 127, *lead, k, dtype=x) if codes else torch.randn(*lead, k).to(x)}
    if op in INT8_OPS:
        a["x_scale"] = torch.rand(*lead, 1) if codes else None
    if op in ("int8_linear", "int8_float_linear"):
        a["codes"] = packing.pack_bytes(ints(-128, 127, n, k, dtype=torch.int8))
    else:
        groups = -(-k // group)
        a["codes"] = packing.pack_nibbles(ints(0, 15, n, k))
        integers, zeros = ints(0, 17, n, groups), ints(0, 15, n, groups)
        if op == "dual_linear":
            a |= {"step": packing.pack_groups(integers), "offset": packing.pack_group_pairs(integers * zeros)}
        else:
            if op == "table_linear":
                a["table"] = CENTERED if table is None else table
            a["step"] = packing.pack_groups(integers if step == "bytes" else torch.rand(n, groups))
            shifted = {"bytes": zeros, "floats": zeros + torch.rand(n, groups), None: None}[zero]
            a["zero"] = None if shifted is None else packing.pack_groups(shifted)
    a |= {"scale": torch.rand(n) / 64, "bias": torch.randn(n) if bias else None}
    if op in ("group_linear", "table_linear"):
        a["zero_bias"] = {"group_linear": 8.0 if zero is None else 0.5}.get(op, 0.0 if zero is None else -8.0)
    if "step" in a:
        a["group"] = group
    return a | {"n": n, "dtype": dtype}


def call(op, a, namespace="qcompile_cpu"):
    return getattr(getattr(torch.ops, namespace), op)(*a.values())


# -- packed weights, by their index formulas -----------------------------------------------------------------------


def unpack_bytes(codes, n, k):
    """int8 values [N, K], float64."""
    r, c = torch.arange(n)[:, None], torch.arange(k)
    return codes[r // 16, c // 4, r % 16, c % 4].double() - 128


def unpack_nibbles(codes, n, k):
    """Codes 0..15 [N, K], int64."""
    r, c = torch.arange(n)[:, None], torch.arange(k)
    return codes[r // 16, c // 8, r % 16, c % 4].long() >> torch.where(c % 8 < 4, 0, 4) & 15


def unpack_groups(values, n, k, group):
    """Each group's value for all of its columns, [N, K], float64."""
    r, g = torch.arange(n)[:, None], torch.arange(k) // group
    return values[r // 16, g, r % 16].double()


def unpack_group_pairs(values, n, k, group):
    r, g = torch.arange(n)[:, None], torch.arange(k) // group
    return values[r // 16, g // 2, r % 16, g % 2].double()


def unpacked_weight(op, a, k):
    """The weight before its scale of channels, [N, K] float64, and a bound of what is summed for it."""
    n = a["n"]
    if "step" not in a:
        weight = unpack_bytes(a["codes"], n, k)
        return weight, weight.abs()
    codes = unpack_nibbles(a["codes"], n, k)
    step = unpack_groups(a["step"], n, k, a["group"])
    if op == "dual_linear":
        weight = step * codes - unpack_group_pairs(a["offset"], n, k, a["group"])
        return weight, weight.abs()
    values = a["table"].double()[codes] if op == "table_linear" else codes.double()
    zero = a["zero_bias"] + (0 if a["zero"] is None else unpack_groups(a["zero"], n, k, a["group"]))
    return step * (values - zero), step.abs() * (values.abs() + abs(zero))


def reference(op, a):
    """What the call must give, in the dtype of the result or in float64, and how far from it the call may be."""
    x, x_scale, scale, bias = a["x"], a.get("x_scale"), a["scale"], a["bias"]
    k = x.shape[-1]
    if op in INT8_OPS and x_scale is None:
        x, x_scale, _ = torch.ops.qcompile.quantize(x, "int8/row")
    weight, size = unpacked_weight(op, a, k)
    sums, sizes = x.double() @ weight.t(), x.double().abs() @ size.t()
    if x_scale is not None and x_scale.ndim:
        x_scale = x_scale.reshape(*x.shape[:-1], 1)
    if op in EXACT_OPS:
        value = sums.float() * x_scale * scale.reshape(-1)
        return (value if bias is None else value + bias.reshape(-1)).to(a["dtype"]), torch.zeros(())
    for factor in (x_scale, None if scale is None else scale.reshape(-1)):
        if factor is not None:
            sums, sizes = sums * factor.double(), sizes * factor.double().abs()
    if bias is not None:
        sums, sizes = sums + bias.reshape(-1).double(), sizes + bias.reshape(-1).double().abs()
    return sums, 2e-6 * sizes + UNIT_ROUNDOFF[a["dtype"]] * sums.abs() + 1e-7


def assert_right(op, a, got):
    want, bound = reference(op, a)
    assert got.shape == want.shape and got.dtype == a["dtype"] and got.is_contiguous()
    if op in EXACT_OPS:
        assert_same(got, want)
    else:
        reached = (got.double() - want).abs() <= bound
        reached |= (a["dtype"] == torch.float16) & (want.abs() >= 65504)  # where float16 ends
        assert bool(reached.all()), float(((got.double() - want).abs() / bound).max())


def assert_same(got, want):
    """Bit for bit, but that NaN is NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def assert_right_for_rows(op, rows, k, n, group, **settings):
    """Calls of every dtype of the result and with one thread and two, one after another."""
    before = torch.get_num_threads()
    try:
        for m, dtype, threads in zip(rows, itertools.cycle(FLOATS), itertools.cycle((1, 2)), strict=False):
            torch.set_num_threads(threads)
            a = operands(op, m, k, n, group, dtype=dtype, bias=m % 5 != 0, **settings)
            assert_right(op, a, call(op, a))
    finally:
        torch.set_num_threads(before)
