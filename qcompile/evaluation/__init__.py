"""Measuring and deciding: perplexity, speed, sensitivity, comparisons of recipes."""
