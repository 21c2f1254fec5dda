"""Which kernels round in training, by the devices that a model is on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from qcompile.codegen.cpu.training_kernels import install_cpu_rounding


def install_rounding(tensors: Iterable[Tensor]) -> None:
    """Use the kernels of every device that has one of the tensors; the definitions in PyTorch round on others.

    Warns:
        UserWarning: those of a device cannot be built here.
    """
    devices = {tensor.device.type for tensor in tensors}
    if "cpu" in devices:
        install_cpu_rounding()
    if "cuda" in devices:  # what imports Triton
        from qcompile.codegen.triton.gpu_rounding import install_gpu_rounding

        install_gpu_rounding()
