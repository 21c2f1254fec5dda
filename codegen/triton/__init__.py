"""NVIDIA GPUs: Triton kernels, rendered from a typed description into plain source that can be read and kept."""
