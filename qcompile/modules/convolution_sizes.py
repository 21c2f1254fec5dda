"""The sizes of a convolution under the names of nn.Conv1d and nn.Conv2d: models compute lengths with them."""

from __future__ import annotations

from qcompile.numerics.code_convolution import ConvolutionShape


class ConvolutionSizes:
    """What a module offers that has the attributes below.

    Attributes:
        size: of the weight, [O, C / groups, ..].
        shape: how it moves over x.
    """

    size: tuple[int, ...]
    shape: ConvolutionShape

    @property
    def in_channels(self) -> int:
        """C."""
        return self.size[1] * self.shape.groups

    @property
    def out_channels(self) -> int:
        """O."""
        return self.size[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The elements of a window in each dimension."""
        return tuple(self.size[2:])

    @property
    def stride(self) -> tuple[int, ...]:
        """Of the windows."""
        return self.shape.stride

    @property
    def padding(self) -> tuple[int, ...]:
        """Zeros on both sides."""
        return self.shape.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """Between the elements of a window."""
        return self.shape.dilation

    @property
    def groups(self) -> int:
        """Of channels."""
        return self.shape.groups
