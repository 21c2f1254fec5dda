"""`OnnxOptions`: what kind of ONNX file to write.

The only description of these options: `qcompile.export_onnx(.., **options)`, the flags of `qcompile export-onnx` and
export_module.py share it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypedDict, TypeVar

from qcompile.codegen.onnx.sentence_embedding import Pooling
from qcompile.recipe.rule import RecipeError

_T = TypeVar("_T")


def _option(default: _T, meaning: str) -> _T:
    """A dataclass field with a help text, which the command line shows too."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """What kind of file.

    Raises:
        RecipeError: a value that is unknown, or that contradicts another.
        PoolingError: an unknown pooling.
    """

    accuracy_level: int = _option(4, "of MatMulNBits: 4 rounds activations to int8 in blocks, 1 keeps float32 (slower)")
    low_memory: bool = _option(
        False, "multiply W4A8 weights by their 4-bit codes only: half the memory, slower prefill"
    )
    last_logits: bool = _option(
        False, "return the logits of the last token only, [B, 1, V]: faster prefill, but perplexity cannot be measured"
    )
    chunk: int | None = _option(
        None,
        "chunk of a prefill in onnxruntime-genai, in tokens: less memory, slower; longer prompts cannot be batched",
    )
    contrib_ops: bool = _option(
        True,
        "use ONNX Runtime's contrib operators; else standard ones only (opset 21), for other runtimes",
    )
    float_cache: bool = _option(
        False, "keep the KV cache in float32, whatever the recipe says: for tools that pass no other, as optimum"
    )
    float_embeddings: bool = _option(
        False, "keep embedding tables in float32; else large ones that are not tied are int8, in blocks of at most 128"
    )
    pooling: str | None = _option(
        None, "MODEL is an encoder: its mean, cls or last token as the output sentence_embedding"
    )
    normalize: bool = _option(False, "with pooling: sentence embeddings of norm 1")

    def __post_init__(self) -> None:
        if self.accuracy_level not in (1, 4):
            raise RecipeError(f"accuracy_level {self.accuracy_level} is unknown: 1 multiplies in float32, 4 in int8")
        if not self.contrib_ops and self.accuracy_level == 1:
            raise RecipeError(
                "accuracy_level 1 cannot be written with standard operators only (contrib_ops=False). Fix: omit it, "
                "and set ONNX Runtime's session.qdq_matmulnbits_accuracy_level to 1 where the file is opened"
            )
        if self.chunk is not None and self.chunk < 1:
            raise RecipeError(f"chunk is a number of tokens of a decoder's prompt, 1 or more, got {self.chunk}")
        if self.normalize and self.pooling is None:
            raise RecipeError(
                "normalize is about the sentence embedding. Fix: give pooling='mean', 'cls' or 'last' too"
            )
        _ = self.sentence_pooling  # an unknown pooling raises here

    @property
    def sentence_pooling(self) -> Pooling | None:
        """`pooling` and `normalize` as the module that computes them."""
        return None if self.pooling is None else Pooling(self.pooling, self.normalize)

    def check_encoder(self) -> None:
        """Raise RecipeError if an option is about decoders only."""
        if self.last_logits:
            raise RecipeError("last_logits is for decoders: an encoder (example=..) has no last token")
        if self.chunk is not None:
            raise RecipeError("chunk is for decoders: an encoder (example=..) reads its texts at once")

    @classmethod
    def of(cls, options: Mapping[str, object]) -> OnnxOptions:
        """The options of keyword arguments.

        Raises:
            TypeError: an unknown option; the text names the nearest.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(known)}"
                raise TypeError(f"unknown ONNX option {name!r}: {hint}")
        return cls(**options)


class OnnxKeywords(TypedDict, total=False):
    """The fields of OnnxOptions as keyword arguments, for the signature of `export_onnx`."""

    accuracy_level: int
    low_memory: bool
    last_logits: bool
    chunk: int | None
    contrib_ops: bool
    float_cache: bool
    float_embeddings: bool
    pooling: str | None
    normalize: bool
