"""Kernels timed on the GPU that is there: launches and variants to keep, baselines to compare with."""
