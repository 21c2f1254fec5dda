"""Recipes by name, each with its source; `qcompile recipes` lists them."""

from __future__ import annotations

from qcompile.numerics.format import Format
from qcompile.passes import (
    AWQ,
    DGQ,
    GPTAQ,
    GPTQ,
    HQQ,
    FineQuant,
    FoldNorm,
    Fuse,
    LoRC,
    OnlineHadamard,
    PerTensorActivations,
    Quantize,
    QuantizeKV,
    ReorderChannels,
    Rotate,
    RotatePrincipal,
    SmoothAttention,
    SmoothQuant,
    SmoothQuantPlus,
    SpinQuant,
    Untie,
)
from qcompile.pipeline.served_presets import SERVED_PRESETS
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.recipe import Recipe

_FOLDED = (Untie(), FoldNorm(), Rotate())
_ROTATIONS = (*_FOLDED, OnlineHadamard(norms=True))
_PRINCIPAL = (Untie(), FoldNorm(), RotatePrincipal())
_FP8 = Format("fp8")


def _recipe(name: str, source: str, *passes: PassConfig) -> Recipe:
    """A recipe that fuses in the end what it quantized."""
    fuse = (Fuse(),) if any(isinstance(config, Quantize) for config in passes) else ()
    return Recipe(name, (*passes, *fuse), (), source)


_INT4 = Format.parse("int4/group128/zero")
_INT4_32 = Format.parse("int4/group32/zero")
_TWO_LEVEL = Format.parse("int4/group128/zero/dual")
_TWO_LEVEL_32 = Format.parse("int4/group32/zero/dual")
_TWO_LEVEL_64 = Format.parse("int4/group64/zero/dual")  # of logits: 64 divides more hidden sizes than 128
_INT8_CACHE = QuantizeKV(8, static=True, optional=True)  # what ONNX Runtime's attention reads

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("float", "no rewriting: the baseline of the quantized recipes"),
        _recipe(
            "int8",
            "W8A8, dynamic per token, data-free (arXiv:2411.02355 without its calibrated passes)",
            Quantize(Format("int8"), Format("int8")),
        ),
        _recipe(
            "int8-zero",
            "W8A8 with zero points for activations: for values of one sign, as after GELU; integers in ONNX files only",
            Quantize(Format("int8"), Format.parse("int8/row/zero")),
        ),
        _recipe(
            "int8-smooth",
            "SmoothQuant W8A8 (arXiv:2211.10438), alpha 0.5; needs calibration",
            Untie(),
            SmoothQuant(),
            Quantize(Format("int8"), Format("int8")),
        ),
        _recipe(
            "int8-rotated",
            "W8A8 on rotated bases (QuaRot arXiv:2404.00456, W8A8 row), data-free",
            *_ROTATIONS,
            Quantize(Format("int8"), Format("int8")),
        ),
        _recipe(
            "int8-gptq",
            "the INT8 of arXiv:2411.02355: SmoothQuant, GPTQ, activations dynamic per token; needs calibration",
            Untie(),
            SmoothQuant(),
            GPTQ(Format("int8"), Format("int8")),
        ),
        _recipe("w8a16", "weight-only int8, per channel", Quantize(Format("int8"), None)),
        _recipe(
            "fp8",
            "FP8 dynamic (arXiv:2411.02355): e4m3, weights per channel, activations per token",
            Quantize(_FP8, _FP8),
        ),
        _recipe("fp8-gptq", "fp8 with codes by GPTQ (arXiv:2210.17323); needs calibration", GPTQ(_FP8, _FP8)),
        _recipe(
            "fp8-principal",
            "fp8 on principal axes, where formats with an exponent round best; needs calibration",
            *_PRINCIPAL,
            Quantize(_FP8, _FP8),
        ),
        _recipe(
            "fp8-principal-gptq", "fp8-principal with codes by GPTQ; needs calibration", *_PRINCIPAL, GPTQ(_FP8, _FP8)
        ),
        _recipe("w4a16", "weight-only int4, groups of 128, zero points, MSE clip", Quantize(_INT4, None, clip=True)),
        _recipe("w4a16-g32", "w4a16 with a scale for every 32 weights, data-free", Quantize(_INT4_32, None, clip=True)),
        _recipe(
            "int4-cpu",
            "for an ONNX folder on a CPU: SmoothQuant, W4A8 with two-level group scales, the logits too; int8 KV cache",
            SmoothQuant(alpha=0.6),  # no Untie: a tied table stays one table in the file
            _INT8_CACHE,
            Quantize(_TWO_LEVEL_32, Format("int8"), lm_head=_TWO_LEVEL_32, lm_head_act=Format("int8"), clip=True),
        ),
        _recipe(
            "int4-cpu-gptq",
            "the best for an ONNX folder on a CPU: W4A8 on rotated bases by GPTQ, groups of 128; int8 KV cache",
            *_FOLDED,
            _INT8_CACHE,
            PerTensorActivations(lm_head=True),
            GPTQ(_TWO_LEVEL, Format("int8"), lm_head=_TWO_LEVEL_64, lm_head_act=Format("int8"), clip=True),
        ),
        _recipe(
            "w4a16-gptq",
            "GPTQ int4, groups of 128, zero points, MSE clip (arXiv:2210.17323; the W4A16 of arXiv:2411.02355)",
            GPTQ(_INT4, None, clip=True),
        ),
        _recipe(
            "w4a16-gptaq",
            "w4a16-gptq towards what the float model computes (GPTAQ, arXiv:2504.02692); slower",
            GPTAQ(_INT4, None, clip=True),
        ),
        _recipe(
            "w4a16-awq",
            "AWQ scales (arXiv:2306.00978), then w4a16; needs calibration",
            Untie(),
            AWQ(clip=True),
            Quantize(_INT4, None, clip=True),
        ),
        _recipe(
            "w4a16-smooth",
            "SmoothQuant+ (arXiv:2312.03788): one searched alpha, then w4a16; needs calibration",
            Untie(),
            SmoothQuantPlus(clip=True),
            Quantize(_INT4, None, clip=True),
        ),
        _recipe(
            "w4a16-finequant",
            "FineQuant (arXiv:2308.09723): a group size for each matrix under 4.4 bits a weight, data-free",
            FineQuant(clip=True),
        ),
        _recipe(
            "w4a16-lorc",
            "w4a16 with a correction of rank 8 (ZeroQuant-V2, arXiv:2303.08302), data-free",
            Quantize(_INT4, None, clip=True),
            LoRC(),
        ),
        _recipe("w4a16-hqq", "HQQ int4, groups of 64, real zeros (mobiusml 2023), data-free", HQQ()),
        _recipe("w4a16-rotated", "w4a16 on rotated bases", *_FOLDED, Quantize(_INT4, None, clip=True)),
        _recipe("w4a16-rotated-gptq", "w4a16-gptq on rotated bases", *_FOLDED, GPTQ(_INT4, None, clip=True)),
        _recipe("w4a8-gptq", "w4a8 with codes by GPTQ; needs calibration", GPTQ(_TWO_LEVEL, Format("int8"), clip=True)),
        _recipe(
            "w4a8",
            "int4 with two-level group scales, int8 activations (DGQ arXiv:2310.04836, QoQ arXiv:2405.04532)",
            Quantize(_TWO_LEVEL, Format("int8")),
        ),
        _recipe(
            "w4a4",
            "round to nearest everywhere; shows what rotation is for",
            Quantize(Format.parse("int4/group128"), Format("int4")),
        ),
        _recipe(
            "w4a4-rotated",
            "QuaRot without GPTQ (arXiv:2404.00456): rotations R1 and R2 folded, an online Hadamard transform",
            *_ROTATIONS,
            Quantize(Format.parse("int4/group128"), Format("int4")),
        ),
        _recipe(
            "w4a8-dgq",
            "DGQ (arXiv:2310.04836): outlier channels clipped down, scales of both levels searched; codes by GPTQ",
            Untie(),
            SmoothQuant(percentile=0.005),
            DGQ(_TWO_LEVEL, Format("int8"), codes="gptq"),
        ),
        _recipe(
            "w4a8kv4-qoq",
            "QServe (QoQ, arXiv:2405.04532): W4A8 by GPTQ, rotated and reordered; 4-bit cache of smoothed keys",
            Untie(),
            FoldNorm(),
            SmoothAttention(),
            SmoothQuant(alpha=0.2, norms=False),
            Rotate(),
            ReorderChannels(),
            QuantizeKV(4),
            GPTQ(_TWO_LEVEL, Format("int8"), clip=True),
        ),
        _recipe(
            "w4a8kv4",
            "W4A8 by GPTQ and the cache of kv4-centered",
            QuantizeKV(4, hadamard=True, sink_tokens=4, center=True),
            GPTQ(_TWO_LEVEL, Format("int8"), clip=True),
        ),
        _recipe(
            "w4a8-lorc",
            "INT4 weights, INT8 activations and LoRC (ZeroQuant-V2, arXiv:2303.08302), data-free",
            Quantize(Format.parse("int4/group128"), Format("int8"), clip=True),
            LoRC(),
        ),
        _recipe(
            "fp4-fp8",
            "ZeroQuant-FP (arXiv:2307.09782): e2m1 weights, scales a power of two apart, e4m3 activations, LoRC",
            Quantize(Format.parse("fp4/group128/m2"), _FP8, clip=True),
            LoRC(),
        ),
        _recipe(
            "w4a4-rotated-gptq",
            "QuaRot (arXiv:2404.00456): rotations, GPTQ, per-token scales",
            *_ROTATIONS,
            GPTQ(_INT4, Format("int4"), clip=True),
        ),
        _recipe(
            "w4a4-rrs",
            "Rotated Runtime Smooth (arXiv:2409.20361) made causal: per-token scales of groups of sorted channels",
            *_FOLDED,
            ReorderChannels(stream=True),
            OnlineHadamard(norms=True),
            GPTQ(_INT4, Format.parse("int4/group128"), clip=True),
        ),
        _recipe(
            "w4a4-rrs-sequence",
            "the same with the paper's statistic, which looks at the whole sequence: for comparison, not for decoding",
            *_FOLDED,
            ReorderChannels(stream=True),
            OnlineHadamard(norms=True),
            GPTQ(_INT4, Format.parse("int4/group128/smooth"), clip=True),
        ),
        _recipe(
            "w4a4-groups",
            "the best W4A4 here: rotations, GPTQ, scales and zero points per token and group",
            *_ROTATIONS,
            GPTQ(_INT4, _INT4, clip=True),
        ),
        _recipe(
            "w4a4-spinquant",
            "SpinQuant (arXiv:2405.16406): learned rotations, GPTQ, per-token scales",
            Untie(),
            FoldNorm(),
            SpinQuant(),
            OnlineHadamard(norms=True),
            GPTQ(_INT4, Format("int4"), clip=True),
        ),
        _recipe("kv8", "an 8-bit key/value cache, weights float", QuantizeKV(8)),
        _recipe("kv8-fixed", "the int8 KV cache of int4-cpu: static per-channel scales", QuantizeKV(8, static=True)),
        _recipe("kv4", "a 4-bit key/value cache, weights float", QuantizeKV(4)),
        _recipe(
            "kv4-smooth",
            "a 4-bit key/value cache of smoothed keys (QServe's SmoothAttention, arXiv:2405.04532), weights float",
            SmoothAttention(),
            QuantizeKV(4),
        ),
        _recipe(
            "kv4-hadamard",
            "a 4-bit key/value cache, keys times a Hadamard matrix (QuaRot, arXiv:2404.00456), weights float",
            QuantizeKV(4, hadamard=True),
        ),
        _recipe(
            "kv4-centered",
            "kv4-hadamard of keys without their mean (arXiv:2410.02367); the first four tokens float (attention sinks)",
            QuantizeKV(4, hadamard=True, sink_tokens=4, center=True),
        ),
        _recipe("exact", "every exact rewriting and no quantization: what `qcompile verify` runs", *_ROTATIONS),
        *SERVED_PRESETS,
    )
}
