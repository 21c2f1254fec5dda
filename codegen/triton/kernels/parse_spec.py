"""From text to a spec: what `str(spec)` wrote, and what a user may write by hand."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from qcompile.codegen.triton.kernels.attention_spec import KVDecode, KVMerge, KVRead, KVWrite
from qcompile.codegen.triton.kernels.experts_spec import GemmExperts, GemmExpertsA8, GemmExpertsW4A8, SumExperts
from qcompile.codegen.triton.kernels.group_spec import GemmFp4Fp8, GemmGroup
from qcompile.codegen.triton.kernels.spec import (
    Dequant,
    Dtype,
    Gemm8,
    GemmW,
    KernelSpec,
    Pack,
    RowQuant,
    SumK,
)
from qcompile.codegen.triton.kernels.training_spec import ChangeCodes, RoundGradient, RoundValues
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8

_KINDS = (
    GemmW, Gemm8, GemmW4A8, GemmGroup, GemmFp4Fp8, GemmExperts, GemmExpertsA8, GemmExpertsW4A8, SumExperts, SumK,
    RowQuant, Dequant, Pack, RoundGradient, RoundValues, ChangeCodes, KVDecode, KVMerge, KVRead, KVWrite,
)  # fmt: skip
KINDS: dict[str, type[KernelSpec]] = {kind.template: kind for kind in _KINDS}


def parse(text: str) -> KernelSpec:
    """Read what `str(spec)` wrote, as gemm_w/bf16/group=64/zero=int/bias.

    Raises:
        ValueError: an unknown template, field or value, with the known ones.
    """
    template, *words = text.split("/")
    if template not in KINDS:
        raise ValueError(f"kernel {text!r}: no template {template!r}; there are {', '.join(KINDS)}")
    kind = KINDS[template]
    values: dict[str, Any] = {}
    known = {field.name: field for field in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    for index, word in enumerate(words):
        name, equal, value = word.partition("=")
        if index == 0 and not equal and name in get_args(Dtype):
            name, value = "dtype", name
        if name not in known:
            raise ValueError(f"kernel {text!r}: {template} has no {name!r}; it has {', '.join(known)}")
        hint = types[name]
        choices = getattr(hint, "__args__", None)
        if choices is not None and value not in choices:
            raise ValueError(f"kernel {text!r}: {name} is one of {', '.join(choices)}, not {value!r}")
        if hint is int and not value.isdigit():
            raise ValueError(f"kernel {text!r}: {name} is a number, not {value!r}")
        values[name] = True if hint is bool else int(value) if hint is int else value
    return kind(**values)
