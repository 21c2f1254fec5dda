"""Targets: how the operators of the dialect run; imported as `qcompile.codegen`. Never what is quantized.

    cpu/      torch.compile on a CPU: operators of our own in C++, the rest fused by Inductor
    triton/   torch.compile on an NVIDIA GPU: Triton kernels, the rest fused by Inductor
    onnx/     files for ONNX Runtime and its GenAI runtime

What cpu/ and triton/ share lies beside them: how fast a kernel is (kernel_choice.py), which tensors it reads
(prepared_weights.py), how large M is (rows.py), and what runs where neither has a kernel (aten_fallback.py).
No target imports another.
"""

if __name__ == "codegen":  # a second copy would register the ops twice
    raise ImportError("import qcompile.codegen, not codegen")
