"""Padding: positions of a batch that its attention mask rules out, which no statistic may count.

The mask is the input that the caller's own keyword names: 2-D, 1 for a token and 0 for padding (`padding_mask`: True
for padding, as PyTorch's attention has it). token_layout.py says where its tokens lie in a value of the graph. A batch
without padding is read as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.token_layout import TokenLayouts
from qcompile.ir.program import Program


class CalibrationError(ValueError):
    """Calibration data that cannot be used; the text names the batch or the site and the fix."""


class TokenMask:
    """Which rows of a program's values are tokens.

    Attributes:
        program: the program.
        masks: the placeholders of masks -> the place of each among the inputs.
        uncounted: names of values whose rows cannot be related to the mask of a batch that has padding.
        unread: names of masks that are something else than 2-D and 0 or 1.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.masks = _mask_inputs(program)
        self.uncounted: dict[str, None] = {}
        self.unread: dict[str, None] = {}
        self._layouts: TokenLayouts | None = None

    def of(self, inputs: Sequence[Any], number: int = 1) -> BatchTokens:
        """The tokens of one batch.

        Args:
            inputs: flat inputs of the program.
            number: of the batch, from 1, for errors.

        Raises:
            CalibrationError: a batch without a token.
        """
        padded: dict[fx.Node, Tensor] = {}
        for node, place in self.masks.items():
            given = inputs[place] if place < len(inputs) else None
            tokens = _tokens(node, given) if isinstance(given, Tensor) else None
            if tokens is None:
                self.unread.update({node.name: None} if isinstance(given, Tensor) else {})
            elif not bool(tokens.any()):
                raise CalibrationError(
                    f"batch {number} has no token: {node.name} rules all of them out. Fix: drop that batch"
                )
            elif not bool(tokens.all()):
                padded[node] = tokens
        return BatchTokens(self, padded)

    @property
    def layouts(self) -> TokenLayouts:
        """Where tokens lie in the program's values, as its graph was when this was first read."""
        if self._layouts is None:
            two = [n for n in self.masks if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim == 2]
            self._layouts = TokenLayouts(self.program, two)
        return self._layouts

    def indices(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The indices that chose the rows of some values: `BatchTokens.indices` needs their values."""
        layouts = [self.layouts.of(node) for node in nodes]
        return {index for layout in layouts if layout is not None for index in layout.indices}

    def notes(self) -> list[str]:
        """What a report must say: values of which padding counts, and masks that were not read."""
        found = []
        if self.uncounted:
            names = list(self.uncounted)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"padding counts in {', '.join(names[:3])}{more}: their rows cannot be related to the mask")
        if self.unread:
            found.append(f"{', '.join(self.unread)} is not 2-D of 0 and 1: no position counts as padding by it")
        return found


class BatchTokens:
    """Which rows of the values of one batch are tokens.

    Attributes:
        indices: the values of indices that chose rows, filled in by whoever runs the graph.
    """

    def __init__(self, of: TokenMask, padded: dict[fx.Node, Tensor]) -> None:
        self._of, self._padded = of, padded
        self.indices: dict[fx.Node, Tensor] = {}

    @property
    def has_padding(self) -> bool:
        """Whether any position is not a token."""
        return bool(self._padded)

    def first_token(self) -> int:
        """The first position that is a token in any sequence, by all masks: what comes before is padding in front."""
        firsts = [int(tokens.any(0).int().argmax()) for tokens in self._padded.values()]
        return min(firsts, default=0) if len(firsts) == len(self._of.masks) else 0

    def spread(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """Which entries of a value belong to tokens.

        Args:
            node: whose value it is.
            value: of any shape.

        Returns:
            A bool tensor of as many dimensions, 1 along those that hold neither sequences nor tokens; None where all
            entries count.
        """
        if not self._padded:
            return None
        layout = self._of.layouts.of(node)
        mask = None if layout is None else self._padded.get(layout.mask)
        if layout is None:
            self._of.uncounted.update({node.name: None} if self._of.layouts.may_hold_padding(node) else {})
        if layout is None or mask is None:
            return None
        found = layout.spread(mask, self.indices, value.ndim)
        if all(size in (1, whole) for size, whole in zip(found.shape, value.shape, strict=True)):
            return found.to(value.device)
        self._of.uncounted[node.name] = None
        return None

    def along(self, node: fx.Node, value: Tensor, channels: int = -1) -> Tensor | None:
        """Which vectors of a value are tokens' own.

        Args:
            node: whose value it is.
            value: of any shape.
            channels: the dimension of the vectors.

        Returns:
            A bool tensor of the value's shape without the dimension of the vectors; None where all count.
        """
        found = self.spread(node, value)
        if found is None or found.shape[channels] != 1:
            self._of.uncounted.update({} if found is None else {node.name: None})
            return None
        shape = list(value.shape)
        del shape[channels]
        return found.squeeze(channels).expand(shape)

    def select(self, node: fx.Node, value: Tensor) -> Tensor:
        """The rows of a value [.., K] that are tokens, [R, K]; the value itself where all are."""
        tokens = self.along(node, value)
        return value if tokens is None else value[tokens]

    def rows(self, node: fx.Node, value: Tensor) -> Tensor:
        """The rows of a value [.., K] that are tokens, [R, K]."""
        return self.select(node, value).reshape(-1, value.shape[-1])

    def watch(
        self,
        nodes: Iterable[fx.Node],
        inputs: Sequence[Any],
        observe: Callable[[fx.Node, Any, BatchTokens], None],
    ) -> None:
        """As `Program.watch`, for this batch; `observe` is given these tokens too."""
        watched = set(nodes)
        chosen = self._of.indices(watched) if self._padded else set()

        def each(node: fx.Node, value: Any) -> None:
            if node in chosen:
                self.indices[node] = value
            if node in watched:
                observe(node, value, self)

        try:
            self._of.program.watch(watched | chosen, inputs, each)
        except CalibrationError as error:  # the interpreter adds where it was
            raise CalibrationError(str(error).splitlines()[0]) from None


def refuse_empty_batches(program: Program, batches: Iterable[Sequence[Any]]) -> None:
    """Refuse batches without a token, before any work.

    Raises:
        CalibrationError: with the place of the first such batch.
    """
    mask = TokenMask(program)
    for number, batch in enumerate(batches if mask.masks else [], 1):
        mask.of(batch, number)


def _mask_inputs(program: Program) -> dict[fx.Node, int]:
    names = {node: re.sub(r"_\d+$", "", node.name).strip("_") for node in program.inputs}
    named = {n for n, name in names.items() if name.endswith(("attention_mask", "padding_mask"))}
    plain = [n for n, name in names.items() if name == "mask"]
    chosen = named or set(plain if len(plain) == 1 else [])
    return {node: place for place, node in enumerate(program.inputs) if node in chosen}


def _tokens(node: fx.Node, given: Tensor) -> Tensor | None:
    """[B, T] bool, True for tokens; None for a mask of another kind."""
    if given.ndim != 2 or node.meta["val"].ndim != 2 or given.is_complex():
        return None
    tokens = given == 1
    if not bool((tokens | (given == 0)).all()):
        return None
    if "padding_mask" in node.name:
        return ~tokens if given.dtype == torch.bool else None
    # An added mask of zeros rules nothing out, and True in a `mask` may mean either: then some row has no token.
    unclear = given.is_floating_point() or "attention_mask" not in node.name
    return None if unclear and not bool(tokens.any(-1).all()) else tokens
