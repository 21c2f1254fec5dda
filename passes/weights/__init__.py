"""Algorithms that choose the codes of weights."""
