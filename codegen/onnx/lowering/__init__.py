"""Quantized matmuls and attentions lowered to nodes that ONNX Runtime has."""
