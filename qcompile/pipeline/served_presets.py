"""Recipes by name for models that other programs serve: formats that their files and kernels have.

Logits stay float for servers of transformers' folders, which read them so by default. `qcompile.export` takes smaller
groups where 128 do not divide the columns of every weight, and float16 scales for a float16 model.
"""

from __future__ import annotations

from qcompile.numerics.format import Format
from qcompile.passes import GPTQ, FoldNorm, Fuse, Quantize, QuantizeKV, Rotate, SmoothQuant, Untie
from qcompile.recipe.pass_config import PassConfig
from qcompile.recipe.recipe import Recipe

_INT4 = Format.parse("int4/group128/bf16")  # symmetric: the only kind that all readers of compressed-tensors take
_FP8 = Format.parse("fp8/row/bf16")
_INT8 = Format.parse("int8/row/bf16")
_Q8_0 = Format.parse("int8/group32/f16")
_Q4_0 = Format.parse("int4/group32/f16")
_Q4_1 = Format.parse("int4/group32/floatzero/f16")
_Q4_K = Format.parse("int4/group32/k6")


def _recipe(name: str, source: str, *passes: PassConfig) -> Recipe:
    return Recipe(name, (*passes, Fuse()), (), source)


SERVED_PRESETS: tuple[Recipe, ...] = (
    _recipe(
        "serve-w4a16",
        "for vLLM, SGLang and transformers: symmetric int4 by GPTQ, groups of 128, bfloat16 scales, float logits",
        GPTQ(_INT4, None, keep_lm_head=True, clip=True),
    ),
    _recipe(
        "serve-w4a16-rotated",
        "serve-w4a16 on rotated bases: the rotations are folded into ordinary weights",
        Untie(),
        FoldNorm(),
        Rotate(),
        GPTQ(_INT4, None, keep_lm_head=True, clip=True),
    ),
    _recipe(
        "serve-w4a16-kv8",
        "serve-w4a16 with an fp8 key/value cache: one static scale for the keys of a layer and one for its values",
        QuantizeKV(8, static=True, fp8="tensor"),
        GPTQ(_INT4, None, keep_lm_head=True, clip=True),
    ),
    _recipe(
        "serve-int8",
        "int8-gptq for vLLM and SGLang: bfloat16 scales, float logits",
        Untie(),
        SmoothQuant(),
        GPTQ(_INT8, Format("int8"), keep_lm_head=True),
    ),
    _recipe(
        "serve-fp8",
        "fp8 for vLLM and SGLang: bfloat16 scales, float logits; data-free",
        Quantize(_FP8, Format("fp8"), keep_lm_head=True),
    ),
    _recipe(
        "serve-w4afp8",
        "int4 weights by GPTQ, fp8 activations, for vLLM on GPUs of compute capability 9.0; float logits",
        GPTQ(_INT4, Format("fp8"), keep_lm_head=True),  # no clip, which makes scales negative
    ),
    _recipe(
        "gguf-q8_0",
        "Q8_0 of GGUF, for llama.cpp: int8 in groups of 32, float16 scales; data-free",
        Quantize(_Q8_0, None, lm_head=_Q8_0),
    ),
    _recipe(
        "gguf-q4_0",
        "Q4_0 of GGUF by GPTQ: symmetric int4 in groups of 32, float16 scales; the logits in Q8_0",
        GPTQ(_Q4_0, None, lm_head=_Q8_0, clip=True),
    ),
    _recipe(
        "gguf-q4_1",
        "Q4_1 of GGUF by GPTQ: int4 in groups of 32 with an offset, float16 scales; the logits in Q8_0",
        GPTQ(_Q4_1, None, lm_head=_Q8_0, clip=True),
    ),
    _recipe(
        "gguf-q4_k",
        "Q4_K of GGUF by GPTQ: six-bit scales of groups of 32; Q4_1 where 256 do not divide K; the logits in Q8_0",
        GPTQ(_Q4_K, None, lm_head=_Q8_0, clip=True, undivided=_Q4_1),
    ),
)
