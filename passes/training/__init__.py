"""Passes that prepare a model for training: their products have gradients, and state that training moves."""
