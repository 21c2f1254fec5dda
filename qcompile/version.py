"""The version of this package; what is written to disk carries it."""

VERSION = "0.1.0"
