"""Quantize and dequantize in the graph: which sites get which formats, inserting the pairs, fusing them."""
