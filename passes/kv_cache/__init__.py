"""Algorithms for the key/value cache."""
