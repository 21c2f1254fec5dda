"""The graph that a program for a phone is made of: a causal LM with a cache of fixed size, or one forward of a module.

A causal LM takes token ids [1, S] and their positions [S], for any S, and keeps its keys and values between calls: the
module of transformers that ExecuTorch's runners expect. Source: transformers, integrations/executorch.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompile.api.example_inputs import call_of
from qcompile.api.model_example import own_example
from qcompile.calibration.context_length import context_length
from qcompile.checkpoint.writers.export_refusals import ExportError
from qcompile.ir.capture import quiet_frontends

CACHE_LENGTH = 2048  # tokens, where the model reads as many
_FIRST = 3  # tokens of the call that is traced


@dataclass(frozen=True)
class EdgeCall:
    """What is exported of a model, and calls to compare the program by.

    Attributes:
        args: arguments by position, to trace with.
        kwargs: arguments by name.
        tokens: how many the program keeps; 0 of one forward.
        facts: what runners ask a program for: name of a method -> what it returns.
        checks: inputs of calls, in a row: tensors in the order of the arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    checks: tuple[tuple[Tensor, ...], ...] = ()

    @staticmethod
    def of(model: Any, example: Any, length: int | None) -> EdgeCall:
        """What can be exported of a model.

        Args:
            model: a module.
            example: its inputs, whose shapes the program has; None: the model is a causal LM.
            length: tokens that a causal LM keeps; None: 2048, or its context where that is less.

        Raises:
            ExportError: no example and no causal LM, or a length that the model cannot keep.
        """
        if example is not None:
            if length is not None:
                raise ExportError(f"an example has a shape, and length={length} was given. Fix: drop one of the two")
            args, kwargs = call_of(example, model)
            inputs = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            return EdgeCall(args, kwargs, checks=(inputs,))
        if not _decodes(model):
            raise ExportError(
                f"{type(model).__name__} is no causal LM of transformers. Fix: give example=<its inputs>, whose shapes "
                "the program will have"
            )
        kept = _length(model, length)
        ids = own_example(model)["input_ids"][:1, : kept - 1].long()
        positions = torch.arange(ids.shape[1])
        cut = ids.shape[1] - 1
        checks = ((ids[:, :cut], positions[:cut]), (ids[:, cut:], positions[cut:]))
        traced = {"input_ids": ids[:, :_FIRST], "cache_position": positions[:_FIRST]}
        return EdgeCall((), traced, kept, _facts(model, kept), checks)

    @property
    def inputs(self) -> str:
        """The inputs of the program, in words."""
        if self.tokens:
            return f"token ids int64 [1, S] and their positions int64 [S], below {self.tokens}"
        shapes = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in self.checks[0]]
        return ", ".join(shapes)

    def expected(self, model: nn.Module) -> list[list[Tensor]]:
        """What a model computes for the calls: all tensors of each result; of a causal LM the logits."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if self.tokens:
                whole = torch.cat([ids for ids, _ in self.checks], 1)
                logits = model(input_ids=whole, use_cache=False).logits
                return [[logits[:, positions]] for _, positions in self.checks]
            out = model(*self.args, **self.kwargs)
        return [[leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]]

    def export(self, model: Any) -> torch.export.ExportedProgram:
        """The graph of a model with weights of torchao.

        Raises:
            ExportError: torch.export cannot trace it.
        """
        from torchao.utils import unwrap_tensor_subclass

        try:
            module = self._with_cache(model) if self.tokens else model
            unwrap_tensor_subclass(module)
            shapes = None
            if self.tokens:
                tokens = torch.export.Dim("tokens", max=self.tokens - 1)
                shapes = {"input_ids": {1: tokens}, "cache_position": {0: tokens}}
            with torch.no_grad(), quiet_frontends():
                return torch.export.export(module, self.args, self.kwargs, dynamic_shapes=shapes, strict=True)
        except Exception as error:  # of torch.export and of the model, of whatever kind
            reason = " ".join(str(error).split())
            raise ExportError(
                f"{type(model).__name__} cannot be exported ({type(error).__name__}: {reason:.300}). Fix: give "
                "example=.. for one forward without a cache, or export to onnx"
            ) from error

    def _with_cache(self, model: Any) -> nn.Module:
        from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

        settings = model.generation_config
        settings.use_cache, settings.cache_implementation = True, "static"
        made: nn.Module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=self.tokens).model
        return made


def _decodes(model: Any) -> bool:
    can = getattr(model, "can_generate", None)
    return can is not None and bool(can()) and not getattr(model.config, "is_encoder_decoder", False)


def _length(model: Any, length: int | None) -> int:
    """The tokens that a program keeps. Raises ExportError if the model cannot keep as many."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)  # a cache of fixed size does not slide
    limits = [limit for limit in (context_length(model), window) if isinstance(limit, int)]
    if length is None:
        return min([CACHE_LENGTH, *limits])
    if length <= _FIRST or length > min(limits, default=length):
        most = f"{_FIRST + 1} to {min(limits)}" if limits else f"more than {_FIRST}"
        raise ExportError(f"length={length}: the model keeps {most} tokens. Fix: choose one of these")
    return length


def _facts(model: Any, tokens: int) -> dict[str, Any]:
    """What runners of ExecuTorch ask a program of a causal LM for."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = {
        "get_max_seq_len": tokens - 1,
        "get_max_context_len": tokens,
        "get_vocab_size": model.config.get_text_config().vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    begin = getattr(model.generation_config, "bos_token_id", None)
    if begin is not None:
        found["get_bos_id"] = begin
    if ends is not None:
        found["get_eos_ids"] = ends if isinstance(ends, list) else [ends]
    return found
