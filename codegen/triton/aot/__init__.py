"""Kernels compiled ahead of time for GPUs that need not be there, and what they may cost."""
