"""Attentions that become one operator, recognized by what they compute."""
