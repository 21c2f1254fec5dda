"""Algorithms that choose how activations are quantized."""
