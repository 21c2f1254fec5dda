"""Kernels timed on a GPU: tile search, baselines, benchmarks."""
