"""Subgraphs that become one operator of ONNX Runtime, one fusion a file."""
