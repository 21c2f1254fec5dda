"""The deployment guideline: each branch, its reasons, and what it refuses."""

from __future__ import annotations

import pytest
from zoo import build

import qcompile
from qcompile.pipeline.advise import KNOWN, Device, advise
from qcompile.pipeline.presets import PRESETS

BIG = 8_000_000_000


@pytest.mark.parametrize(
    "device,serving,count,data,want",
    [
        ("h100", "sync", BIG, True, "w4a16-gptq"),
        ("h100", "async", BIG, True, "fp8"),
        ("a100", "async", BIG, True, "int8-gptq"),
        ("a100", "async", BIG, False, "int8"),
        ("a6000", "async", BIG, True, "w4a16-gptq"),
        ("a6000", "sync", BIG, False, "w4a16-g32"),
        ("h100", "sync", 135_000_000, True, "fp8"),
        ("t4", "async", 135_000_000, True, "int8"),
        ("h100", "async", 100_000_000_000, True, "w4a16-gptq"),  # does not fit in eight bits
    ],
)
def test_the_guideline(device, serving, count, data, want):
    advice = advise(count, Device.named(device), serving, data=data)
    assert advice.recipe == want and advice.reasons and all(len(r) > 20 for r in advice.reasons)


def test_cpus():
    small, large = Device("cpu", 4e9), Device("cpu", 64e9)
    assert advise(BIG, large).recipe == "int8-gptq" and advise(BIG, large, data=False).recipe == "int8"
    assert advise(5_000_000_000, small).recipe == "w4a8-gptq"
    with pytest.raises(ValueError, match="larger device"):
        advise(BIG, small)


def test_a_cpu_without_dot_products_is_told_so():
    with_, without = (advise(BIG, Device("cpu", 64e9, int8=fast)) for fast in (True, False))
    assert with_.recipe == without.recipe == "int8-gptq"
    assert "no 8-bit dot products" in without.reasons[-1] and "fastest for prompts" in with_.reasons[-1]


def test_every_advice_is_a_preset():
    for name in KNOWN:
        for serving in ("sync", "async"):
            for data in (True, False):
                for count in (10**8, 10**10):
                    assert advise(count, Device.named(name), serving, data=data).recipe in PRESETS


@pytest.mark.parametrize("call", [lambda: Device.named("tpu"), lambda: advise(1, Device("cpu", 1e9), "batch")])
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError, match="tpu|serving"):
        call()


@pytest.mark.slow
def test_auto_quantizes_with_the_advised_preset():
    report = qcompile.quantize(build("llama"), "auto", progress=False)
    assert report.recipe in PRESETS and not report.skipped
