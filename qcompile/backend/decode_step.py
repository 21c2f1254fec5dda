"""One decoded token as one call: the graph of a causal LM for one token, compiled ahead of time.

torch.compile checks some hundred guards and passes some hundred weights from Python for each token. Here the graph of
one token behind a cache is captured once, quantized and lowered as the backend does it, and compiled by AOTInductor.
The library knows its weights: a call takes the token, its position, the mask, and the buffers of the cache, and gives
logits and the new keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from qcompile.backend.ahead_of_time import compile_ahead
from qcompile.backend.cached_graph import capture_step
from qcompile.backend.dynamo import compile_program
from qcompile.backend.library_calls import OtherStrides, compile_calls, cut_program
from qcompile.backend.options import Options
from qcompile.codegen.cpu.native_kernels import start_loading_native_kernels
from qcompile.modules.kv_cache import QuantizedLayer
from qcompile.modules.kv_states import PerTokenStates


class DecodeStep:
    """A compiled step of a causal LM, for one token of one text.

    Attributes:
        report: what was quantized, and by which kernels.
        program: the lowered graph.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        """Capture, quantize, lower and compile.

        Raises:
            Exception: whatever capture or the compiler raise.
        """
        start_loading_native_kernels()
        graph = capture_step(model)
        self._cache = graph.cache
        self.program, self.report = compile_program(graph.program, graph.inputs, options)
        self._run = self._compile(graph.inputs, options)

    def _compile(self, inputs: list[Tensor], options: Options) -> Callable[[list[Tensor]], list[Tensor]]:
        """Equal blocks by one library, the rest by others; or the whole by one."""
        blocked = cut_program(self.program) if options.compile_blocks else None
        if blocked is not None:
            with contextlib.suppress(OtherStrides):
                return compile_calls(self.program, blocked, inputs, options.inductor, compile_ahead)
        self._graph = compile_ahead(self.program, options.inductor)  # whose weights the library reads where they are
        return self._graph.open()

    def takes(self, cache: Cache) -> bool:
        """Whether the layers of a cache hold what the step reads: a caller's own may have another format."""
        used = {getattr(layer, "used", 0) for layer in cache.layers}  # those that do not grow in place have no count
        if len(cache.layers) != len(self._cache.layers) or len(used) != 1 or 0 in used:
            return False
        return all(_reads_as(one, like) for one, like in zip(cache.layers, self._cache.layers, strict=True))

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Run the step.

        Args:
            ids: the token, int64 [1, 1].
            positions: its position, int64 [1, 1].
            mask: 0 at padding, int64 [1, T + 1]; it says how many tokens the buffers hold.
            buffers: what the layers of the cache read, as CachedGraph has it.

        Returns:
            Logits [1, 1, V], and what the token adds to the cache, likewise.
        """
        found: list[Tensor] = self._run([ids, positions, mask, *buffers])
        return found


def _reads_as(layer: CacheLayerMixin, like: CacheLayerMixin) -> bool:
    """Whether the buffers of a layer mean what those of another do."""
    if isinstance(like, QuantizedLayer):
        if not isinstance(layer, QuantizedLayer) or layer.dtype != like.dtype:
            return False
        states = (layer.own_keys, like.own_keys), (layer.own_values, like.own_values)
        return all(isinstance(own, PerTokenStates) and own.reads_as(other) for own, other in states)
    if isinstance(layer, QuantizedLayer):
        return False
    pairs = (layer.keys, like.keys), (layer.values, like.values)
    return all((a.dtype, a.shape[1], a.shape[3]) == (b.dtype, b.shape[1], b.shape[3]) for a, b in pairs)
