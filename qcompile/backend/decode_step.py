"""One decoded token as one call: the graph of a causal LM for one token, compiled ahead of time.

torch.compile checks some hundred guards and passes some hundred weights from Python for each token. Here the graph of
one token behind a cache is captured once, quantized and lowered as the backend does it, and compiled by AOTInductor.
The library knows its weights: a call takes the token, its position, the mask, and the buffers of the cache, and gives
logits and the new keys and values.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.backend.dynamo import compile_program
from qcompile.backend.options import Options
from qcompile.codegen.cpu.native_kernels import start_loading_native_kernels
from qcompile.ir.capture import from_exported, quiet_frontends
from qcompile.ir.node_meta import WEIGHT
from qcompile.ir.program import Program

_EXAMPLE_PAST, _EXAMPLE_ROOM = 16, 64  # tokens; both sizes are dynamic


class DecodeStep:
    """A compiled step of a causal LM, for one token of one text.

    Attributes:
        report: what was quantized, and by which kernels.
        layers: of the cache.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        """Capture, quantize, lower and compile.

        Raises:
            Exception: whatever capture or the compiler raise.
        """
        start_loading_native_kernels()
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._inputs = self._example(model)
        self.layers = (len(self._inputs) - 3) // 2
        self.program, self.report = compile_program(self._capture(model), self._inputs, options)
        self._loader, self._weights = _compile(self.program, self._inputs)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Run the step.

        Args:
            ids: the token, int64 [1, 1].
            positions: its position, int64 [1, 1].
            mask: 0 at padding, int64 [1, T + 1]; it says how many tokens the buffers hold.
            buffers: keys and values of each layer after the other, [1, G, C, D] with C > T.

        Returns:
            Logits [1, 1, V], and the token's keys and values [1, G, 1, D] of each layer after the other.
        """
        found: list[Tensor] = self._loader.run([ids, positions, mask, *buffers])
        return found

    def _example(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            cache = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
        shapes = [part.shape for layer in cache.layers for part in (layer.keys, layer.values)]
        dtype = cache.layers[0].keys.dtype
        buffers = [torch.zeros(1, s[1], _EXAMPLE_PAST + _EXAMPLE_ROOM, s[3], dtype=dtype) for s in shapes]
        position = torch.full((1, 1), _EXAMPLE_PAST)
        mask = torch.ones(1, _EXAMPLE_PAST + 1, dtype=torch.long)
        return [torch.zeros(1, 1, dtype=torch.long), position, mask, *buffers]

    def _capture(self, model: nn.Module) -> Program:
        step = _Step(model, self.takes_positions)
        ids, positions, mask, *buffers = self._inputs
        dynamic = torch.export.Dim.DYNAMIC
        shapes = (None, None, {1: dynamic}, [{2: dynamic} for _ in buffers])
        with torch.no_grad(), quiet_frontends():
            exported = torch.export.export(step, (ids, positions, mask, buffers), dynamic_shapes=shapes, strict=False)
        return from_exported(exported, step, "model.")


class _Step(nn.Module):
    """A causal LM whose cache comes as buffers, and which gives its new keys and values."""

    def __init__(self, model: nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model, self.takes_positions = model, takes_positions

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, buffers: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """As DecodeStep's call."""
        from qcompile.modules.step_cache import step_cache

        cache = step_cache([part[:, :, : mask.shape[1] - 1] for part in buffers])
        more = {"position_ids": positions} if self.takes_positions else {}
        out = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        return out.logits, [part for layer in cache.layers for part in layer.new]


class _Flat(nn.Module):
    """A lowered program as a module: its weights are buffers."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.graph_module, self.names = program.graph_module, list[str | None]()
        for index, node in enumerate(program.placeholders):
            name = node.meta.get(WEIGHT)
            self.names.append(None if name is None else f"weight_{index}")
            if name is not None:
                self.register_buffer(f"weight_{index}", program.weights[name])

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph."""
        given = iter(inputs)
        return self.graph_module(*[next(given) if name is None else getattr(self, name) for name in self.names])


def _compile(program: Program, inputs: Sequence[Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Compile by AOTInductor.

    Returns:
        The loaded library, and the weights that it reads where they are: keep them.
    """
    flat, dynamic = _Flat(program), torch.export.Dim.DYNAMIC
    shapes = {"inputs": (None, None, {1: dynamic}, *[{2: dynamic} for _ in inputs[3:]])}
    with torch.no_grad(), quiet_frontends(), tempfile.TemporaryDirectory() as folder:
        exported = torch.export.export(flat, tuple(inputs), dynamic_shapes=shapes, strict=False)
        path = torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(Path(folder) / "step.pt2"),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )
        loader = torch._inductor.aoti_load_package(path).loader
    weights = {**exported.constants, **dict(flat.named_buffers(remove_duplicate=False))}
    kept = {name: weights[name] for name in loader.get_constant_fqns()}
    loader.load_constants(kept, False, True, True, False)  # the tensors themselves, not copies
    return loader, kept
