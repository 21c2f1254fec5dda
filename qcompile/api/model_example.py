"""The example that a model brings, or that its config describes: what it is traced with where a caller gives none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.api.example_inputs import call_of, widen_batch
from qcompile.api.model_wrappers import described
from qcompile.ir.call_tree import tensors_of
from qcompile.recipe.rule import RecipeError

_ROWS, _TOKENS, _SAMPLES = 2, 8, 4000


def own_example(model: nn.Module) -> dict[str, Any]:
    """The first of `own_examples`. Raises RecipeError if there is none."""
    return next(own_examples(model))


def own_examples(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The examples that a model runs on, of what it brings (transformers' `dummy_inputs`) and what its config says.

    Images and sounds come first: an example of text alone does not reach the parts that read them.

    Raises:
        RecipeError: there is none.
    """
    failures: list[str] = []
    found = False
    for example in _candidates(model):
        failure = _failure(model, example)
        if failure is None:
            found = True
            yield example
        else:
            failures.append(f"; it does not run on {', '.join(example)} ({failure[:150]})")
    if not found:
        raise RecipeError(
            f"{type(model).__name__} brings no example input to trace with{failures[0] if failures else ''}. Fix: "
            "qcompile.quantize(model, recipe, example=<a tensor, tuple or dict of inputs>)"
        )


def _failure(model: nn.Module, example: dict[str, Any]) -> str | None:
    """Why a model does not run on an example; None if it does."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return None if tensors_of(model(**example)) else "it gives no tensor"
    except Exception as error:  # the model's own, of whatever kind
        return f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)


def traceable_example(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments to trace a model with that brings its own example. Raises RecipeError."""
    return widen_batch(*call_of(own_example(model)))


def _candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    model = described(model)
    parameters = set(inspect.signature(model.forward).parameters)
    config = getattr(model, "config", None)
    brought = getattr(model, "dummy_inputs", None)
    if config is not None:
        yield from ConfigExample(model, config, parameters).richer()
    if isinstance(brought, dict):
        yield brought
    if config is not None and "input_ids" in parameters:
        yield {"input_ids": ConfigExample(model, config, parameters).ids()}


class ConfigExample:
    """Inputs of the shapes that a config of transformers describes.

    Attributes:
        model: what takes them.
        config: of the model.
        parameters: names that its forward takes.
    """

    def __init__(self, model: nn.Module, config: Any, parameters: set[str]) -> None:
        self.model, self.config, self.parameters = model, config, parameters
        self.vision = getattr(config, "vision_config", None) or config
        self.audio = getattr(config, "audio_config", None) or getattr(config, "encoder", None) or config

    def ids(self, tokens: int = _TOKENS) -> Tensor:
        """Token ids [2, tokens] without special ones."""
        get_text = getattr(self.config, "get_text_config", None)
        text = get_text() if callable(get_text) else self.config
        vocabulary = int(getattr(text, "vocab_size", None) or getattr(self.config, "vocab_size", None) or 2)
        special = {v for c in (self.config, text) for k, v in vars(c).items() if "token" in k and isinstance(v, int)}
        allowed = [i for i in range(min(vocabulary, 512)) if i not in special] or [0]
        return torch.tensor([allowed[(5 * i + 3) % len(allowed)] for i in range(_ROWS * tokens)]).view(_ROWS, tokens)

    def richer(self) -> Iterator[dict[str, Any]]:
        """Examples with what `dummy_inputs` of models lack: images, sounds, the tokens of a decoder."""
        decoder = {}
        is_pair = getattr(self.config, "is_encoder_decoder", False)
        if is_pair and "decoder_input_ids" in self.parameters:
            decoder = {"decoder_input_ids": self.ids()}
        for media in (self._patches(), self._pixels(), self._features(), self._samples()):
            if media is not None and "input_ids" in self.parameters:
                for text in self._texts_around(media):
                    yield {**text, **media, **decoder}
                yield {"input_ids": self.ids(), **media, **decoder}
            elif media is not None:
                yield {**media, **decoder}
        if decoder and "input_ids" in self.parameters:
            yield {"input_ids": self.ids(), **decoder}

    def _patches(self) -> dict[str, Tensor] | None:
        """Images cut into rows of patches, with the grid of each."""
        side = 4
        if not {"pixel_values", "image_grid_thw"} <= self.parameters:
            return None
        channels = _first(self.vision, "in_channels", "in_chans", "num_channels", default=3)
        patch = _first(self.vision, "patch_size", default=14)
        columns = channels * _first(self.vision, "temporal_patch_size", default=1) * patch**2
        grid = torch.tensor([[1, side, side]] * _ROWS)
        return {"pixel_values": _noise(_ROWS * side**2, columns), "image_grid_thw": grid}

    def _pixels(self) -> dict[str, Tensor] | None:
        if "pixel_values" not in self.parameters or "image_grid_thw" in self.parameters:
            return None
        size = getattr(self.vision, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = _first(self.vision, "num_channels", "in_channels", "in_chans", default=3)
        return {"pixel_values": _noise(_ROWS, channels, height, width)}

    def _features(self) -> dict[str, Tensor] | None:
        """Spectrograms [2, bands, frames]; an encoder with positions halves the frames once."""
        bands = _first(self.audio, "num_mel_bins", default=0)
        if "input_features" not in self.parameters or not bands:
            return None
        frames = 2 * _first(self.audio, "max_source_positions", default=32)
        return {"input_features": _noise(_ROWS, bands, frames)}

    def _samples(self) -> dict[str, Tensor] | None:
        if "input_values" not in self.parameters:
            return None
        bands = _first(self.audio, "num_mel_bins", default=0)
        length = _first(self.audio, "max_length", default=0)
        return {"input_values": _noise(_ROWS, length, bands) if bands and length else _noise(_ROWS, _SAMPLES)}

    def _texts_around(self, media: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Token ids with as many placeholders in each row as one image or sound may have embeddings."""
        token = _first(self.config, *_PLACEHOLDERS, default=-1)
        for count in () if token < 0 else self._embeddings(media):
            ids = self.ids(count + _TOKENS)
            ids[:, 2 : 2 + count] = token
            types = {"mm_token_type_ids": ids.eq(token).long()} if "mm_token_type_ids" in self.parameters else {}
            yield {"input_ids": ids, **types}

    def _embeddings(self, media: dict[str, Tensor]) -> list[int]:
        """How many embeddings one image or sound may become: a list has them one by one, a tensor all together."""
        get_text = getattr(self.config, "get_text_config", None)
        width = getattr(get_text() if callable(get_text) else self.config, "hidden_size", 0)
        counts: dict[int, None] = {}
        for name in ("get_image_features", "get_audio_features"):
            features = getattr(self.model, name, None)
            if features is None or not width:
                continue
            try:
                with torch.no_grad():
                    found = tensors_of(features(**media))
            except Exception:  # noqa: S112  an example without it comes next
                continue
            rows = [t.numel() // width for t in reversed(found) if t.shape[-1:] == (width,)]
            counts |= dict.fromkeys(rows) | dict.fromkeys(count // _ROWS for count in rows)
        return list(counts)


_PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")


def _first(config: Any, *names: str, default: int) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), default)


def _noise(*shape: int) -> Tensor:
    """Reproducible, without a draw from the caller's generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
