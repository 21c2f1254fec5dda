"""ONNX Runtime's operators as torch operators (torch.ops.qcompile_onnx), typed views of their calls, their translation.

Importing this package registers the operators.
"""

from qcompile.codegen.onnx.ops import (  # noqa: F401
    activation_ops,
    attention_ops,
    embedding_ops,
    expert_ops,
    matmul_ops,
    norm_ops,
)
