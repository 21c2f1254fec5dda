"""Quantized products and attentions written as ONNX nodes."""
