"""The clip search finds the best of its ranges."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_formats import FORMATS

from qcompile.numerics import clip_search
from qcompile.numerics.format import Format
from qcompile.numerics.qparams import fake_quantize
from qcompile.numerics.rounding import quantize_tensor
from qcompile.testing import weights


@given(weights(), st.sampled_from([f for f in FORMATS if "tensor" not in f and "/m" not in f]))
def test_clip_never_increases_its_own_loss(w, text):
    form = Format.parse(text)
    loss = [float((quantize_tensor(w, form, clip=c).dequantize() - w).abs().pow(2.4).sum()) for c in (False, True)]
    assert loss[1] <= loss[0] * (1 + 1e-4)


@given(
    weights(),
    st.sampled_from(["int2/row", "int4/row/zero", "int4/row/floatzero", "int8/row", "fp8/row", "fp4/row"]),
)
def test_clip_is_the_best_of_its_ranges(w, text):
    form = Format.parse(text)
    found = (quantize_tensor(w, form, clip=True).dequantize() - w).abs().pow(2.4).sum(1)
    for shrink in range(21):
        max_value = 1 - shrink / 100
        low, high = w.amin(1, keepdim=True).clamp_max(0) * max_value, w.amax(1, keepdim=True).clamp_min(0) * max_value
        if form.zero == "none":
            high = torch.maximum(-low, high)
            low = -high
        one = (quantize_tensor(torch.clamp(w, low, high), form).dequantize() - w).abs().pow(2.4).sum(1)
        assert bool((found <= one * (1 + 1e-3) + 1e-12).all()), shrink


@given(weights(), st.sampled_from(["int2/row", "int3/row", "int4/row"]))
def test_clip_tries_the_extreme_on_the_code_that_only_one_side_has(w, text):
    form = Format.parse(text)
    found = (quantize_tensor(w, form, clip=True).dequantize() - w).abs().pow(2.4).sum(1)
    extreme = w.gather(1, w.abs().argmax(1, keepdim=True))
    for shrink in range(21):
        scale = extreme * (1 - shrink / 100) / form.qmin
        one = (fake_quantize(w, torch.where(scale == 0, 1, scale), None, form) - w).abs().pow(2.4).sum(1)
        assert bool((found <= one * (1 + 1e-3) + 1e-12).all()), shrink


def test_the_chunks_of_a_search_change_nothing(monkeypatch):
    w = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    whole = quantize_tensor(w, Format.parse("int4/group16/zero"), clip=True)
    monkeypatch.setattr(clip_search, "_CHUNK", 7 * 64)
    chunked = quantize_tensor(w, Format.parse("int4/group16/zero"), clip=True)
    for one, other in zip(whole.parts[:3], chunked.parts[:3], strict=True):
        assert torch.equal(one, other)


@given(st.integers(0, 999), st.sampled_from(["int4/group32", "int3/group32", "int8/group32"]))
def test_a_clip_search_may_put_the_extreme_on_the_code_below_zero(seed, form):
    """Symmetric codes reach -8 but only 7: the searched scale may be negative; never worse than max / 7."""
    form = Format.parse(form)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 4.0  # alone, on the side of seven codes
    plain, searched = quantize_tensor(x, form), quantize_tensor(x, form, clip=True)

    def cost(q):
        return (q.dequantize() - x).abs().pow(2.4).unflatten(-1, (2, 32)).sum(-1)

    assert bool((cost(searched) <= cost(plain) * (1 + 1e-5)).all())
    assert int(searched.codes.min()) >= form.qmin and int(searched.codes.max()) <= form.qmax
    assert bool((searched.scale < 0).any()) == (form.bits < 8)
