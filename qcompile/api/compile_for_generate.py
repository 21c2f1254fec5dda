"""`compile_for_generate(model)`: `model.generate()` with a compiled prefill and a compiled decode step."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from qcompile.backend.options import Options
from qcompile.modules.cache_argument import NAMES, cache_name, given_cache, returned_cache
from qcompile.recipe.report import Report
from qcompile.recipe.rule import RecipeError

if TYPE_CHECKING:
    from qcompile.backend.decode_step import DecodeStep

_PLAIN = frozenset(
    (*NAMES, "input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep")
)
"""Arguments of a forward that the step knows; with any other the model runs as torch.compile has it."""


def compile_for_generate(model: nn.Module, recipe: str | None = None, **options: Any) -> Report:
    """Compile a causal LM for text generation on a CPU, in place: `model.generate()` is called as before.

    A prompt goes through `torch.compile(backend="qcompile")`. A token of one text behind a cache goes through a step
    that is compiled ahead of time (backend/decode_step.py), over a cache that grows in place. Everything else, several
    texts or beams, attention maps, caches of other kinds, is done by the compiled forward.

    Args:
        model: a causal LM of transformers, float or quantized by `qcompile.quantize`, in evaluation mode.
        recipe: for a float model, as the backend's option; its weights stay, the compiled graphs read quantized ones.
        options: further options of the backend, as in `torch.compile(options=..)`.

    Returns:
        What the step quantized, by which kernels. Where there is none, `report.breaks` says why.

    Raises:
        RecipeError: bad options, or a recipe that the backend does not take. The model is then unchanged.
        TypeError: the model has no forward that takes input_ids and a cache.
    """
    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} has no generate(). Fix: give a causal LM of transformers")
    given = {**options, **({} if recipe is None else {"recipe": recipe})}
    checked = Options.read(given)
    forward = model.forward
    while isinstance(forward, _Forward):  # compiled before: begin again
        forward = forward.eager
    decoder = _Forward(model, forward, given, checked)
    model.forward = decoder
    return decoder.report


@contextlib.contextmanager
def _forward_of(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a model call this forward, and its own again afterwards."""
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _wants_eager() -> bool:
    """Whether the caller reads the model itself: torch.compile, an export, or what sets the stance to force_eager."""
    from torch._dynamo import eval_frame

    tracing = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    return tracing or eval_frame._stance.stance == "force_eager"


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


class _Forward:
    """The forward of a compiled causal LM: which call goes where."""

    def __init__(self, model: nn.Module, eager: Callable[..., Any], given: Mapping[str, Any], options: Options) -> None:
        self.model, self.eager, self.options = model, eager, options
        self.__signature__ = inspect.signature(eager)
        self.__code__ = inspect.unwrap(eager).__code__  # torch.export names the place by it
        self.compiled = torch.compile(eager, backend="qcompile", dynamic=True, options=dict(given))
        self.step: DecodeStep | None = None
        self.report = self._make_step()
        self.versions = self._weight_versions()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _wants_eager():
            return self.eager(*args, **kwargs)
        cache = given_cache(kwargs)
        if self.step is None or args or torch.is_grad_enabled() or cache is None:
            return self.compiled(*args, **kwargs)
        ids = kwargs.get("input_ids")
        known = all(name in _PLAIN or value is None for name, value in kwargs.items())
        if known and isinstance(ids, Tensor) and ids.shape == (1, 1) and cache.get_seq_length() > 0:
            found = self._decode(ids, cache, kwargs)
            if found is not None:
                return found
        return self._prefill(cache, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or stored model is not compiled: its forward is the copy's own."""
        return _itself, (self.eager,)

    def _prefill(self, cache: Any, kwargs: Mapping[str, Any]) -> Any:
        from qcompile.generation.growing_cache import as_dynamic, as_growing, obstacle_to_growing

        if self._weight_versions() != self.versions:
            self.report, self.versions = self._make_step(), self._weight_versions()
        if obstacle_to_growing(cache) is not None:
            return self.compiled(**kwargs)
        as_dynamic(cache)
        found = self.compiled(**kwargs)
        as_growing(cache)
        return found

    def _decode(self, ids: Tensor, cache: Any, kwargs: Mapping[str, Any]) -> Any:
        """One token by the step; None if this call is not one that it takes."""
        from transformers.cache_utils import DynamicLayer
        from transformers.modeling_outputs import CausalLMOutputWithPast

        from qcompile.codegen.cpu.native_kernels import ops
        from qcompile.generation.growing_cache import GrowingLayer, as_growing
        from qcompile.modules.kv_cache import QuantizedLayer

        step = self.step
        assert step is not None
        past = cache.get_seq_length()
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is None:
            mask = torch.ones(1, past + 1, dtype=torch.long)
        if positions is None:
            positions = torch.full((1, 1), past)
        if all(type(layer) in (GrowingLayer, DynamicLayer, QuantizedLayer) for layer in cache.layers):
            as_growing(cache)  # windows may have lost tokens
        if (
            not step.takes(cache)
            or mask.shape != (1, past + 1)
            or positions.shape != (1, 1)
            or mask.dtype != torch.long
        ):
            return None
        buffers = [layer.reserve(1) for layer in cache.layers]
        read = [part for layer, own in zip(cache.layers, buffers, strict=True) for part in (*layer.floats, *own)]
        logits, *rows = step(ids, positions, mask, read)
        ops.append_rows([part for own in buffers for part in own], rows, cache.layers[0].used)
        for layer in cache.layers:
            layer.advance(1)
        output = CausalLMOutputWithPast(logits=logits, **{cache_name(): cache})
        return output if kwargs.get("return_dict", True) is not False else output.to_tuple()

    def _make_step(self) -> Report:
        from qcompile.backend.decode_step import DecodeStep
        from qcompile.generation.growing_cache import obstacle_to_growing

        self.step = None
        report = Report("no decode step")
        try:
            encodes = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            cache = None if encodes else self._cache()
            obstacle = "it returns no cache of keys and values" if cache is None else obstacle_to_growing(cache)
            obstacle = "its decoder reads an encoder's output" if encodes else obstacle
            if obstacle is None:
                with _forward_of(self.model, self.eager):  # whose signature says whether it takes positions
                    self.step = DecodeStep(self.model, self.options)
                report = self.step.report
        except RecipeError:
            raise
        except Exception as error:  # of the model, of capture, of the C++ compiler: torch.compile serves all the same
            obstacle = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        report.metrics["decode steps"] = 1 if obstacle is None else 0
        if obstacle is not None:
            report.breaks.append(f"tokens are decoded by torch.compile: {obstacle}")
        return report

    def _cache(self) -> Any:
        with torch.no_grad(), _forward_of(self.model, self.eager):  # with its hooks, which may quantize the cache
            found = self.model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
        cache = returned_cache(found)
        return cache if hasattr(cache, "layers") else None

    def _weight_versions(self) -> list[tuple[int, int]]:
        """What changes when a weight is written to or replaced."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
