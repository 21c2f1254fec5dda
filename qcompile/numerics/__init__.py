"""Quantized values: formats, scales and zero points, rounding, packing. Tensors only, no graph and no model."""
