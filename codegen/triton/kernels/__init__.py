"""Triton kernels: specs, the templates that render them, the JIT."""
