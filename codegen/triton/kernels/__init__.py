"""Triton kernels as descriptions and as source: specs, the templates that render them, weight layouts, the JIT."""
