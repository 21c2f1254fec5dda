"""Operators of ONNX Runtime as torch operators, and their translation."""
