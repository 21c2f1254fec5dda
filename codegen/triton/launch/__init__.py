"""Kernels run on tensors: tiles, split-K, packed weights, and what was measured on this GPU."""
