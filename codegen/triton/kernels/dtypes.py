"""Names of dtypes in kernel specs."""

from __future__ import annotations

import torch

from qcompile.codegen.triton.kernels.spec import Dtype

NAMES: dict[torch.dtype, Dtype] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that kernels read and write; a model in another dtype has no kernels."""
