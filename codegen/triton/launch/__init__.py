"""Kernels launched on tensors: grids, tiles, packed weights, measured choices."""
