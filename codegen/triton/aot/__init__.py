"""Kernels compiled ahead of time for GPUs that need not be there, and their budget."""
