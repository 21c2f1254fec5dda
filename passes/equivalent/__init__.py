"""Rewritings that keep the function: each has a law, and a certificate on the user's own model."""
